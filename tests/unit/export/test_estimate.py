"""What an export is said to take, from sizes alone."""

from dataclasses import replace

import pytest

from export.estimate import GB, GIB, Job, Sizes, check_room, estimate
from runtime.errors import UserError

DEPTHS, WIDTHS = (3, 3, 27, 3, 6), (192, 384, 768, 1536, 3072)
RELEASED = Sizes(DEPTHS, WIDTHS, hidden=4096, layers=32, mlp=11008, kv_share=1.0, vocabulary=32000, tied=False)
OPTIONS = {"encoder": "--precision", "decoder": "--decoder-precision"}
INT4 = Job(1536, "fp32", "int4")


def test_weights_are_counted_from_the_configuration():
    assert RELEASED.encoder_weights == pytest.approx(669_161_664 + 29_360_128, rel=0.01)  # PyTorch's, and the projector
    assert RELEASED.layer_weights == 202_375_168
    assert RELEASED.encoder_flops(1536) == pytest.approx(4 * RELEASED.encoder_flops(768))
    assert replace(RELEASED, kv_share=0.25).layer_weights == 202_375_168 - 2 * 3 * 1024 * 4096


@pytest.mark.parametrize(
    ("precision", "layers", "size"),
    [  # of files that were written
        ("fp32", 2, 2_669_756_416),
        ("fp16", 2, 1_334_878_208),
        ("int4", 2, 941_381_632),
        ("int4", 4, 1_208_889_344),
        ("int8", 2, 1_129_283_584),
        ("w4a16", 2, 564_633_600),
    ],
)
def test_disk_is_that_of_the_files(precision, layers, size):
    found = estimate(replace(RELEASED, layers=layers), Job(1536, decoder=precision), 2)
    assert found.disk == pytest.approx(size, rel=0.01)


def test_a_bundles_further_graphs_share_the_weights_and_take_time():
    job = Job(1536, decoder="int4")
    alone, whole = (estimate(RELEASED, replace(job, variants=variants), 2) for variants in (False, True))
    assert alone.disk < whole.disk < 1.25 * alone.disk
    assert alone.memory == whole.memory
    assert alone.seconds < whole.seconds < 4 * alone.seconds


def test_a_tied_table_is_stored_once():
    tied = replace(RELEASED, tied=True)
    saved = estimate(RELEASED, Job(1536, decoder="fp16"), 2).disk - estimate(tied, Job(1536, decoder="fp16"), 2).disk
    assert saved == RELEASED.table * 2


def test_memory_does_not_grow_with_the_layers_and_time_does():
    two, four = (estimate(replace(RELEASED, layers=layers), INT4, 2) for layers in (2, 4))
    assert two.memory == four.memory
    assert two.seconds < four.seconds
    assert estimate(RELEASED, INT4, 4).seconds == pytest.approx(estimate(RELEASED, INT4, 2).seconds / 2)


def test_a_comparison_takes_more_of_both():
    full, none = estimate(RELEASED, INT4, 2), estimate(RELEASED, replace(INT4, check="none"), 2)
    assert full.memory >= none.memory
    assert full.seconds > none.seconds
    assert full.disk == none.disk


def test_what_fits_is_told_with_what_there_is():
    line = check_room(RELEASED, INT4, 20 * GIB, 50 * GB, 2, OPTIONS)
    assert "(20.0 available)" in line
    assert "(50.0 free)" in line
    assert "minutes on 2 cores" in line
    assert "available" not in check_room(RELEASED, INT4, None, 50 * GB, 2, OPTIONS)


@pytest.mark.parametrize(
    ("job", "memory", "disk", "mentions"),
    [
        (INT4, 2.5, 50, ["(2.5 available)", "; --check none takes"]),
        (replace(INT4, decoder="fp32"), 20, 20, ["(20.0 free)", "; --decoder-precision fp16 takes"]),
        (replace(INT4, decoder="fp32"), 20, 8, ["; --decoder-precision int4 takes"]),
        (INT4, 20, 7, ["; --precision fp16 takes"]),
        (replace(INT4, decoder="fp32"), 20, 6.5, ["; --check none --precision fp16 --decoder-precision int4 takes"]),
        (INT4, 0.1, 50, ["whatever its options"]),
        (INT4, 20, 1, ["whatever its options"]),
    ],
)
def test_what_does_not_fit_names_the_option_that_would(job, memory, disk, mentions):
    with pytest.raises(UserError) as error:
        check_room(RELEASED, job, int(memory * GIB), int(disk * GB), 2, OPTIONS)
    for mention in mentions:
        assert mention in str(error.value)
    assert "\n" not in str(error.value)
