"""What a server is told reaches what it is built from."""

import pytest

from runtime.errors import UserError
from runtime.serve.__main__ import main, parse
from runtime.serve.settings import Settings


@pytest.mark.parametrize("size", [None, 0, 12345])
def test_the_image_cache_has_the_bytes_that_were_given(conformance_bundle, size):
    options = [] if size is None else ["--image-cache-bytes", str(size)]
    given = vars(parse(["--bundle", str(conformance_bundle), *options]))
    settings = Settings.of(**{name: given[name] for name in Settings.model_fields if name in given})
    assert settings.load().cache.max_bytes == (256 << 20 if size is None else size)


def test_an_image_cache_below_nothing_is_refused():
    with pytest.raises(UserError, match=r"^--image-cache-bytes: .*-1$"):
        Settings.of(image_cache_bytes=-1)


def test_what_is_not_given_fits_the_memory(conformance_bundle, monkeypatch):
    chosen = {"available": 64 << 30}
    monkeypatch.setattr("runtime.backends.select.available_bytes", lambda: chosen["available"])
    settings = Settings.of(bundle=str(conformance_bundle))
    roomy, plan = settings.fitted()
    assert (roomy.max_batch, roomy.context, roomy.kv_precision) == (8, 4096, "fp32")
    assert roomy.image_cache_bytes == 256 << 20
    chosen["available"] = plan.costs.fixed + (30 << 20)  # a slot takes 12 MiB in float32
    tight, plan = settings.fitted()
    assert (tight.max_batch, tight.context, tight.kv_precision) == (2, 4096, "fp32") and plan.fits
    assert 0 < tight.image_cache_bytes < 2 << 20
    chosen["available"] = plan.costs.fixed + (15 << 20)
    tighter, plan = settings.fitted()
    assert (tighter.max_batch, tighter.kv_precision) == (2, "fp16") and plan.fits
    assert tighter.fitted()[0] == tighter
    assert tighter.load().decoder_backend.kv_precision == "fp16"


def test_a_context_of_ones_own(conformance_bundle):
    settings = Settings.of(bundle=str(conformance_bundle), context=512, kv_precision="fp16", max_batch=3)
    fitted, plan = settings.fitted()
    assert (fitted.max_batch, fitted.context, fitted.kv_precision) == (3, 512, "fp16")
    assert plan.kv_bytes == 3 * 512 * 2 * 3 * 4 * 32 * 2
    model = settings.load()
    assert model.decoder.capacity == 512 and model.decoder_backend.kv_precision == "fp16"
    _, plan = settings.model_copy(update={"kv_precision": "int8"}).fitted()
    assert plan.kv_bytes == 3 * 512 * 2 * 3 * 4 * (32 + 4), "with a float32 scale of each key and value"
    with pytest.raises(UserError, match=r"^--context is 5000, the model has 4096 positions$"):
        Settings.of(bundle=str(conformance_bundle), context=5000).fitted()
    with pytest.raises(UserError, match=r"^--kv-precision"):
        Settings.of(kv_precision="fp8")


def test_the_sum_is_told(conformance_bundle, capsys, monkeypatch):
    monkeypatch.setattr("runtime.backends.select.available_bytes", lambda: 1 << 20)
    options = ["--bundle", str(conformance_bundle), "--check", "--max-batch", "2"]
    assert main([*options, "--kv-precision", "int8"]) == 0
    assert "MiB in int8" in capsys.readouterr().out
    assert main(options) == 0
    told = capsys.readouterr()
    assert "2 slots of up to" in told.out and "weights, mapped" in told.out
    assert "available        1 MiB" in told.out
    assert "warning: all slots full would take" in told.err and "--max-batch" in told.err


def test_the_servers_resolution_and_aspect(conformance_bundle, capsys):
    options = ["--bundle", str(conformance_bundle), "--check"]
    assert main([*options, "--res", "320", "--aspect", "any"]) == 0
    assert "320 pixels, any" in capsys.readouterr().out
    settings = Settings.of(bundle=str(conformance_bundle), res=1024)
    assert settings.planned().costs.encoder == 16 * Settings.of(bundle=str(conformance_bundle)).planned().costs.encoder
    with pytest.raises(UserError, match=r"^--res 300: resolution 300 .*nearest valid: 256 or 320$"):
        Settings.of(bundle=str(conformance_bundle), res=300).fitted()
    with pytest.raises(UserError, match=r"^--aspect: "):
        Settings.of(aspect="stretch")
