"""Images that clients have named are kept within bounds, each owner's apart."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.serve.named_images import ImageFile, NamedImages


def file(size, fill=b"x"):
    return ImageFile(fill * size, fill, False)


def test_a_name_stands_for_the_last_file_and_is_its_owner_s():
    images = NamedImages()
    images.put("a", "page", file(3))
    images.put("a", "page", file(4))
    assert images.get("a", "page") == file(4)
    assert images.get("b", "page") is None


def test_those_go_first_that_were_not_used_for_longest():
    images = NamedImages(max_bytes=10, max_count=3)
    for name in "abc":
        images.put("", name, file(3))
    images.get("", "a")
    images.put("", "d", file(1))
    assert [images.get("", name) is not None for name in "abcd"] == [True, False, True, True]
    images.put("", "e", file(10))
    assert [images.get("", name) is not None for name in "acde"] == [False, False, False, True]
    images.put("", "f", file(11))
    assert images.get("", "f") is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 12))))
def test_it_never_holds_more_than_it_may(puts):
    images, last = NamedImages(max_bytes=10, max_count=3), {}
    for owner, name, size in puts:
        images.put(owner, name, file(size))
        last[owner, name] = file(size)
        kept = [found for key in last if (found := images.get(*key)) is not None]
        assert sum(len(one.content) for one in kept) <= 10
        assert len(kept) <= 3
        assert all(images.get(*key) in (None, one) for key, one in last.items())
        assert size > 10 or images.get(owner, name) == file(size)
