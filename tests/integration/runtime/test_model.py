"""The model: prompts of several images, chats, and many questions about the same images."""

import io

import numpy as np
import pytest
from PIL import Image

import runtime
import runtime.image.decode


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


def test_several_images_and_their_places(model, conformance, picture):
    first, second = conformance / "case0.png", conformance / "case1.png"
    ahead, placed, swapped = (runtime.Trace() for _ in range(3))
    options = runtime.Options(max_new_tokens=4)
    *_, last = model.generate([first, second], "Compare.", options, ahead)
    list(model.generate([first, second], "<image>\n<image>\nCompare.", options, placed))
    list(model.generate([second, first], "Compare.", options, swapped))
    assert last.result.visual_tokens == 32
    assert np.array_equal(ahead.first_logits, placed.first_logits)
    assert not np.allclose(ahead.first_logits, swapped.first_logits)
    assert np.array_equal(ahead.image_embeds[:16], swapped.image_embeds[16:])


def test_text_alone_needs_no_image(model):
    *_, last = model.generate([], "Hello", runtime.Options(max_new_tokens=3))
    assert last.result.visual_tokens == 0


def test_stop_string_ends_the_answer_and_is_left_out(model, conformance, reference):
    case = reference["cases"][0]
    options = runtime.Options(max_new_tokens=24, stop=("come",))
    *pieces, last = model.generate([conformance / case["image"]], case["prompt"], options)
    assert last.result.text == case["generated_text"].split("come")[0]
    assert last.result.finish_reason == "stop"
    assert "".join(piece.text for piece in [*pieces, last]) == last.result.text


def test_repetition_penalty_changes_a_repeating_answer(model, conformance, reference):
    case = reference["cases"][0]  # its first answer says one token twice in a row
    plain, punished = (
        list(model.generate([conformance / case["image"]], case["prompt"], runtime.Options(24, sampling)))[-1].result
        for sampling in (runtime.Sampling(), runtime.Sampling(repetition_penalty=5.0))
    )
    assert len(set(plain.token_ids)) < len(plain.token_ids)
    assert len(set(punished.token_ids)) == len(punished.token_ids)


def test_chat_keeps_the_image_and_answers_as_one_long_prompt_would(model, conformance):
    """Turn two through the cache against the same token ids prefilled at once."""
    options = runtime.Options(max_new_tokens=6)
    conversation = model.chat(options)
    *_, first = conversation.ask("What is it?", [conformance / "case0.png"])
    trace = runtime.Trace()
    *_, second = conversation.ask("And now?", trace=trace)
    assert trace.pixel_values == []
    assert second.result.visual_tokens == 0
    assert second.result.prompt_tokens < 60 < first.result.prompt_tokens

    from runtime.text.template import first_turn, next_turn

    whole = runtime.Trace()
    *_, _ = model.generate([conformance / "case0.png"], "What is it?", options, whole)
    ids = model.tokenizer.encode_prompt(first_turn(model.bundle.prompt, "What is it?", 1), [16])
    ids += first.result.token_ids
    ids += model.tokenizer.encode_prompt(next_turn(model.bundle.prompt, "And now?"), [], continued=True)
    logits = model.decoder.start(512).forward(ids, whole.image_embeds)
    assert np.abs(logits - trace.first_logits).max() < 1e-4 * np.abs(logits).max()


def test_what_a_stop_string_cut_off_is_no_part_of_the_chat(model, conformance, reference):
    """A stop string that begins in one token and ends in the next one: the second turn sees what was shown alone."""
    case = reference["cases"][0]
    *_, whole = model.generate([conformance / case["image"]], case["prompt"], runtime.Options(max_new_tokens=24))
    ids = whole.result.token_ids
    shown = [model.tokenizer.decode(ids[:count]) for count in range(len(ids))]
    last, middle = next(
        (count, before)
        for count in range(4, len(ids) - 1)
        if (before := shown[count][len(shown[count - 1]) :]) and (after := shown[count + 1][len(shown[count]) :])
    )
    after = shown[last + 1][len(shown[last]) :]
    stop = middle[-1] + after[0]
    assert shown[last + 1].find(stop) == len(shown[last]) - 1
    conversation, trace = model.chat(runtime.Options(max_new_tokens=24, stop=(stop,))), runtime.Trace()
    *_, first = conversation.ask(case["prompt"], [conformance / case["image"]])
    assert first.result.text == shown[last][:-1]
    *_, _ = conversation.ask("And now?", trace=trace)

    from runtime.text.template import first_turn, next_turn

    traced = runtime.Trace()
    *_, _ = model.generate([conformance / case["image"]], case["prompt"], runtime.Options(max_new_tokens=1), traced)
    prompt = model.tokenizer.encode_prompt(first_turn(model.bundle.prompt, case["prompt"], 1), [16])
    prompt += ids[: last - 1]
    prompt += model.tokenizer.encode_prompt(next_turn(model.bundle.prompt, "And now?"), [], continued=True)
    logits = model.decoder.start(512).forward(prompt, traced.image_embeds)
    assert np.abs(logits - trace.first_logits).max() < 1e-4 * np.abs(logits).max()


def test_an_answer_ends_where_another_question_is_asked(model, picture):
    for asking in (model.chat(runtime.Options(max_new_tokens=4)), model.about([picture], runtime.Options(4))):
        first = asking.ask("What is this?")
        next(first)
        *_, second = asking.ask("And this?")
        assert len(second.result.token_ids) == 4
        with pytest.raises(runtime.UserError, match="ended by another question"):
            next(first)


def test_a_question_that_is_refused_leaves_the_answer_under_way(model, picture):
    options = runtime.Options(max_new_tokens=4)
    for start in (lambda: model.chat(options), lambda: model.about([picture], options)):
        *_, whole = start().ask("What is this?")
        asking = start()
        first = asking.ask("What is this?")
        begun = [next(first).token_id]
        with pytest.raises(runtime.UserError, match="longer than the context"):
            next(asking.ask("word " * 5000))
        assert begun + [piece.token_id for piece in first] == whole.result.token_ids


def test_answer_stops_where_the_context_ends(model):
    prompt = "What? " * 980
    *_, last = model.generate([], prompt, runtime.Options(max_new_tokens=4096))
    assert last.result.prompt_tokens + len(last.result.token_ids) == 4096
    assert last.result.finish_reason == "length"


def test_an_image_beyond_the_context_is_refused_before_it_is_computed(model, picture, monkeypatch):
    monkeypatch.setattr(model, "encoder", lambda pixel_values: pytest.fail("encoded"))
    with pytest.raises(runtime.UserError, match=r"16384 of them visual.*context"):
        next(model.generate([picture], "What?", runtime.Options(resolution=8192)))


def test_conversations_have_room_for_the_context_and_one_turn_for_itself(model):
    conversation = runtime.Conversation(model, runtime.Options(4))
    answers = [list(conversation.ask("And now?"))[-1].result.token_ids for _ in range(3)]
    chat = model.chat(runtime.Options(4))
    assert answers == [list(chat.ask("And now?"))[-1].result.token_ids for _ in range(3)]
    sequence = model.decoder.start(4)
    sequence.forward([1, 2, 3])
    with pytest.raises(ValueError, match="5 positions do not fit a KV cache of 4"):
        sequence.forward([4, 5])


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model, picture):
    def two_turns(between) -> list[int]:
        conversation = model.chat(runtime.Options(5))
        list(conversation.ask("What is it?", [picture]))
        between(conversation)
        return list(conversation.ask("And now?"))[-1].result.token_ids

    def too_long(conversation):
        with pytest.raises(runtime.UserError, match="context"):
            next(conversation.ask("What? " * 3000))

    def interrupted(conversation):
        """Once the KV cache has grown, as on a GPU, where the wait comes after that."""
        sequence = conversation._session._sequence
        forward = sequence.forward_greedy

        def interrupt(*arguments):
            forward(*arguments)
            raise KeyboardInterrupt

        sequence.forward_greedy = interrupt
        with pytest.raises(KeyboardInterrupt):
            next(conversation.ask("And what else?", [picture]))
        sequence.forward_greedy = forward

    assert two_turns(too_long) == two_turns(interrupted) == two_turns(lambda conversation: None)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_an_image_of_a_turn_that_was_interrupted_is_not_taken_for_the_next(
    conformance_bundle, conformance, cache_bytes
):
    """Interrupted once its image is in the KV cache, and before the turn counts."""
    model, options = runtime.load(conformance_bundle, cache_bytes=cache_bytes), runtime.Options(max_new_tokens=6)
    chat, began = model.chat(options), runtime.Conversation._began

    def interrupt(*_):
        raise KeyboardInterrupt

    chat._began = interrupt
    with pytest.raises(KeyboardInterrupt):
        next(chat.ask("What is it?", [conformance / "case0.png"]))
    chat._began = began.__get__(chat)
    *_, last = chat.ask("What is it?", [conformance / "case1.png"])
    *_, fresh = model.generate([conformance / "case1.png"], "What is it?", options)
    assert last.result.token_ids == fresh.result.token_ids


def test_a_first_turn_that_fails_can_be_asked_again(model, picture):
    conversation = model.chat(runtime.Options(5))
    with pytest.raises(runtime.UserError):
        next(conversation.ask("What? " * 3000, [picture]))
    *_, last = conversation.ask("What?", [picture])
    *_, alone = model.generate([picture], "What?", runtime.Options(5))
    assert last.result.token_ids == alone.result.token_ids


def test_an_answer_left_early_is_part_of_the_conversation(model, picture):
    """The pieces that were taken, and no more, precede the next question."""
    left, whole = model.chat(runtime.Options(6)), model.chat(runtime.Options(3))
    pieces = left.ask("What is it?", [picture])
    taken = [next(pieces).token_id for _ in range(3)]
    pieces.close()
    *_, last = whole.ask("What is it?", [picture])
    assert last.result.token_ids == taken
    assert [piece.token_id for piece in left.ask("And?")][:3] == [piece.token_id for piece in whole.ask("And?")]


def test_questions_about_the_same_images_are_answered_as_if_alone(model, picture):
    options = runtime.Options(max_new_tokens=6)
    prompts = ["What is this?", "What is this? Say it in one word.", "<image> before?", "What is this?"]
    questions = model.about([picture], options)
    for number, prompt in enumerate(prompts):
        trace, alone_trace = runtime.Trace(), runtime.Trace()
        *_, last = questions.ask(prompt, trace)
        *_, alone = model.generate([picture], prompt, options, alone_trace)
        assert (last.result.token_ids, last.result.text) == (alone.result.token_ids, alone.result.text)
        scale = np.abs(alone_trace.first_logits).max()
        np.testing.assert_allclose(trace.first_logits, alone_trace.first_logits, rtol=0, atol=1e-5 * scale)
        np.testing.assert_array_equal(trace.image_embeds, alone_trace.image_embeds)
        if number:  # the image is neither encoded again nor, where it comes first, prefilled again
            assert last.result.timings.encode_ms == 0
            assert last.result.prompt_tokens < alone.result.prompt_tokens - (16 if prompt[0] != "<" else 0)


def test_a_question_that_fails_does_not_harm_the_next(model, picture, monkeypatch):
    options = runtime.Options(max_new_tokens=4)
    questions = model.about(picture, options)
    *_, first = questions.ask("What is this?")
    with pytest.raises(runtime.UserError, match="longer than the context"):
        list(questions.ask("word " * 5000))
    with monkeypatch.context() as patch:
        sequence = questions._session._sequence
        patch.setattr(sequence, "_step", (None, sequence._step[1]))
        with pytest.raises(AttributeError):
            list(questions.ask("And is this what it was?"))
    *_, again = questions.ask("What is this?")
    assert again.result.token_ids == first.result.token_ids


def test_one_image_may_come_in_any_form(model):
    """Its content, an open file, an array, a Pillow image: the same answer, alone and in a list."""
    pixels = np.random.default_rng(3).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    answers = set()
    for form in (pixels, file.getvalue(), bytearray(file.getvalue()), Image.fromarray(pixels)):
        for images in (form, [form], io.BytesIO(file.getvalue())):
            *_, last = model.generate(images, "What is it?", runtime.Options(max_new_tokens=4))
            answers.add(tuple(last.result.token_ids))
    assert len(answers) == 1
