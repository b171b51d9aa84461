"""Exports of the released width: their peak memory is that of a few layers, however many there are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.memory import GIB, Ran
from runtime.bundle.manifest import open_bundle
from tests.support.released import run_command

DECODER_GIB, BUNDLE_GIB = 4, 8


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_the_decoder_s_peak_does_not_grow_with_its_layers(precision: str, checkpoint_of: Callable, tmp_path: Path):
    peaks = {}
    for layers in (2, 4):
        out = tmp_path / str(layers)
        arguments = ["--checkpoint", checkpoint_of(layers), "--precision", precision, "--out", out]
        peaks[layers] = run_command("export.decoder", *arguments).peak.own
        shutil.rmtree(out)
    assert max(peaks.values()) < 1.1 * min(peaks.values()), peaks
    assert max(peaks.values()) < DECODER_GIB * GIB, peaks


def test_a_bundle_with_its_encoder_stays_within_its_budget(exported: tuple[Path, Ran]):
    folder, ran = exported
    assert ran.peak.own < BUNDLE_GIB * GIB, str(ran)
    assert open_bundle(folder).decoder.layers == 2
