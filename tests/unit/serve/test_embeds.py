"""Embeddings that clients send: two formats, nothing that executes, and errors for all else."""

import base64
import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UserError
from runtime.serve.embeds import embeds_bytes, read_embeds

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3) / 4


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def safetensors(dtype, data, shape=(2, 3), name="embeds", **more):
    described = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, name: described, **more}).encode()
    return len(header).to_bytes(8, "little") + header + data


BF16 = (VALUES.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        npy(VALUES),
        npy(VALUES.astype(np.float16)),
        npy(VALUES.astype(">f4")),
        npy(np.asfortranarray(VALUES)),
        safetensors("F32", VALUES.tobytes()),
        safetensors("F16", VALUES.astype(np.float16).tobytes()),
        safetensors("BF16", BF16.tobytes()),
    ],
)
def test_a_tensor_is_read(content):
    """Of values that all types hold."""
    found = read_embeds(content, 3)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, VALUES)


def test_safetensors_own_file_is_read():
    save = pytest.importorskip("safetensors.numpy").save
    np.testing.assert_array_equal(read_embeds(save({"image": VALUES}), 3), VALUES)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04 and more", "torch.save"),
        (pickle.dumps([1]), "no known format"),
        (b"", "no known format"),
        (npy(np.array([{}]), allow_pickle=True), "no whole .npy"),
        (npy(VALUES)[:-1], "no whole .npy"),
        (npy(VALUES).replace(b"(2, 3)", b"(9, 9)"), "no whole .npy"),
        (npy(VALUES.astype(np.float64)), "float64"),
        (npy(VALUES.astype(np.int32)), "int32"),
        (npy(VALUES.T), r"\[3, 2\], expected \[tokens, 3\]"),
        (npy(VALUES[None]), r"\[1, 2, 3\]"),
        (npy(VALUES[:0]), r"\[0, 3\]"),
        (npy(VALUES + np.inf), "NaN or Inf"),
        (safetensors("F64", VALUES.tobytes()), "F64"),
        (safetensors("F32", VALUES.tobytes()[:-4]), "damaged"),
        (safetensors("F32", VALUES.tobytes(), (2, -3)), "damaged"),
        (safetensors("F32", VALUES.tobytes(), (2, 3.0)), "damaged"),
        (safetensors("F32", VALUES.tobytes()) + b"x", "damaged"),
        (safetensors("F32", VALUES.tobytes(), other={}), "one tensor"),
        (safetensors("F32", VALUES.tobytes(), other={"dtype": [], "shape": 1, "data_offsets": 1}), "one tensor"),
        (safetensors("F32", VALUES.tobytes(), name="__metadata__"), "one tensor"),
        (safetensors([], VALUES.tobytes()), "expected F16"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "no known format"),
    ],
)
def test_other_content_is_refused_in_one_line(content, said):
    with pytest.raises(UserError, match=said) as error:
        read_embeds(content, 3)
    assert "\n" not in str(error.value)


@given(st.sampled_from([npy(VALUES), safetensors("F32", VALUES.tobytes())]), st.data())
def test_damage_is_an_error_of_the_user(content, data):
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = content[:at] + data.draw(st.binary(max_size=4)) + content[data.draw(st.integers(at, len(content))) :]
    try:
        found = read_embeds(damaged, 3)
    except UserError:
        return
    assert (found.dtype, found.shape[1]) == (np.float32, 3)


def test_base64_is_read_within_a_limit():
    assert embeds_bytes(base64.b64encode(b"abcd").decode(), 4) == b"abcd"
    for text, said in (("YWJj!", "base64"), ("é", "base64"), ("YWJjZGVmZ2hpamtsbW5v", "larger")):
        with pytest.raises(UserError, match=said):
            embeds_bytes(text, 4)
