"""What a server is told reaches what it is built from."""

import pytest

from runtime.errors import UserError
from runtime.serve.__main__ import parse
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
