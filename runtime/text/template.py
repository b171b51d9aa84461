"""From a question to the text the model was trained on, and from the model's text to where its answer stops.

A template is data and travels in the bundle's manifest, so a bundle renders the same with any later version of this
module. The ones known here are LLaVA's `vicuna_v1` and `plain` (`llava/conversation.py`) and ChatML as SmolLM2's and
Qwen's chat templates write it.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from runtime.errors import UserError

IMAGE_PLACEHOLDER = "<image>"
IMAGE_LINE = f"{IMAGE_PLACEHOLDER}\n"
MARKED_IMAGE_LINE = f"<im_start>{IMAGE_PLACEHOLDER}<im_end>\n"  # for mm_use_im_start_end
_SYSTEM, _PROMPT, _TOOLS, _CALL, _RESULT = "{system}", "{prompt}", "{tools}", "{call}", "{result}"
_MUST_HOLD = {"system_format": _SYSTEM, "turn_format": _PROMPT, "image_format": IMAGE_PLACEHOLDER}
_TOOLS_MUST_HOLD = {"system_format": _TOOLS, "call_format": _CALL, "result_format": _RESULT}


@dataclass(frozen=True)
class ToolTemplate:
    """How functions that a model may call are written.

    system_format: what follows the system text, "{tools}" standing for a line of JSON for each function.
    call_format: a call as the model answers it, "{call}" standing for `{"name": ..., "arguments": ...}`. What comes
        before that tells a call from a text.
    result_format: what a function returned, "{result}" standing for it, as part of the next question.
    """

    system_format: str = (
        "\n\nFunctions that may be called, one a line:\n{tools}\n"
        'To call one, answer with <tool_call>{"name": its name, "arguments": {its arguments}}</tool_call> and nothing '
        "else. What it returns comes between <tool_response> and </tool_response>.\n"
    )
    call_format: str = "<tool_call>{call}</tool_call>"
    result_format: str = "<tool_response>{result}</tool_response>"

    @classmethod
    def from_dict(cls, values: Any) -> "ToolTemplate":
        """Raises UserError, naming the key, if one is missing, unknown or of no use."""
        section = cast(dict[str, Any], values) if isinstance(values, dict) else dict[str, Any]()
        if section.keys() != _TOOLS_MUST_HOLD.keys():
            found, expected = sorted(section), [*_TOOLS_MUST_HOLD]
            raise UserError(f"manifest: prompt template 'tools' has {found}; expected {expected}")
        for key, held in _TOOLS_MUST_HOLD.items():
            if not isinstance(section[key], str) or section[key].count(held) != 1:
                raise UserError(f"manifest: prompt template 'tools' {key!r} is {section[key]!r}; expected one {held!r}")
        template = cls(**section)
        if not template.call_begin.strip():
            raise UserError("manifest: prompt template 'tools' 'call_format' has nothing before the call")
        return template

    @property
    def call_begin(self) -> str:
        """What a call begins with."""
        return self.call_format.partition(_CALL)[0]

    def told(self, tools: list[str]) -> str:
        """What the model is told of functions, a JSON text each."""
        return self.system_format.replace(_TOOLS, "\n".join(tools))

    def call(self, name: str, arguments: str) -> str:
        """A call. name, arguments: JSON texts."""
        return self.call_format.replace(_CALL, f'{{"name": {name}, "arguments": {arguments}}}')

    def result(self, text: str) -> str:
        return self.result_format.replace(_RESULT, text)


@dataclass(frozen=True)
class PromptTemplate:
    """How a conversation is written.

    name: for messages only.
    system: the system text where none is asked for.
    system_format: what a conversation opens with, "{system}" standing for the system text.
    turn_format: a question up to where the answer begins, "{prompt}" standing for the question.
    answer_end: what comes between an answer and the next question.
    stop: strings that end an answer if the model writes them out.
    image_format: what stands for an image in front of a question, and within it without its newline; holds "<image>"
        once.
    tools: where the model was trained with one of its own.
    """

    name: str
    system: str
    system_format: str
    turn_format: str
    answer_end: str
    stop: tuple[str, ...]
    image_format: str = IMAGE_LINE
    tools: ToolTemplate | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the manifest; `from_dict` reads it back."""
        section = {**asdict(self), "stop": list(self.stop)}
        if self.tools is None:
            del section["tools"]
        return section

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> "PromptTemplate":
        """Raises UserError, naming the key, if one is missing, unknown or of no use."""
        names = {field.name for field in fields(cls)} - {"tools"}
        for key in sorted(names ^ (section.keys() - {"tools"})):
            raise UserError(f"manifest: prompt template {'lacks' if key in names else 'has an unknown'} key {key!r}")
        stop = section["stop"]
        texts = cast(list[Any], stop) if isinstance(stop, list) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"manifest: prompt template 'stop' is {stop!r}; expected a list of non-empty strings")
        for key in sorted(names - {"stop"}):
            if not isinstance(section[key], str):
                raise UserError(f"manifest: prompt template {key!r} is {section[key]!r}; expected a string")
        for key, held in _MUST_HOLD.items():
            if section[key].count(held) != 1:
                raise UserError(f"manifest: prompt template {key!r} is {section[key]!r}; expected one {held!r} in it")
        values: dict[str, Any] = {**section, "stop": tuple(texts)}
        if "tools" in section:
            values["tools"] = ToolTemplate.from_dict(section["tools"])
        return cls(**values)


VICUNA_V1 = PromptTemplate(
    name="vicuna_v1",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_format="{system} ",
    turn_format="USER: {prompt} ASSISTANT:",
    answer_end="</s>",
    stop=("</s>",),
)
PLAIN = PromptTemplate(
    name="plain",
    system="",
    system_format="{system}",
    turn_format="{prompt}\n",
    answer_end="\n",
    stop=("\n",),
)
CHATML = PromptTemplate(
    name="chatml",
    system="You are a helpful assistant.",
    system_format="<|im_start|>system\n{system}<|im_end|>\n",
    turn_format="<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    answer_end="<|im_end|>\n",
    stop=("<|im_end|>",),
)
TEMPLATES = {template.name: template for template in (VICUNA_V1, PLAIN, CHATML)}


def first_turn(template: PromptTemplate, prompt: str, images: int, system: str | None = None) -> str:
    """The text that opens a conversation, up to where the first answer begins.

    Args:
        template: of the bundle.
        prompt: the question. If it holds `<image>` placeholders, the images go there, else in front of it.
        images: number of images that come with it.
        system: system text, None for the template's.

    Raises:
        UserError: the prompt holds placeholders, but not one for each image.
    """
    return system_text(template, system) + _turn(template, prompt, images)


def next_turn(template: PromptTemplate, prompt: str, images: int = 0) -> str:
    """The text from the end of the last answer up to where the next one begins.

    It opens with the token that ends an answer, so that one is not to be fed to the model before. Arguments and errors
    are those of `first_turn`.
    """
    return template.answer_end + _turn(template, prompt, images)


def system_text(template: PromptTemplate, system: str | None) -> str:
    """What a conversation opens with. system: None for the template's own."""
    return template.system_format.replace(_SYSTEM, template.system if system is None else system)


def turn_text(template: PromptTemplate, question: str) -> str:
    """A question as the template writes it, up to where the answer begins."""
    return template.turn_format.replace(_PROMPT, question)


def with_answer(prompt: str, answer: str) -> str:
    """A rendered prompt with the answer after it, as in training: a space between words, none after a line's end."""
    return prompt + ("" if prompt[-1:].isspace() else " ") + answer


def _turn(template: PromptTemplate, prompt: str, images: int) -> str:
    placeholders = prompt.count(IMAGE_PLACEHOLDER)
    if placeholders == 0:
        prompt = template.image_format * images + prompt
    elif placeholders != images:
        raise UserError(f"prompt: {placeholders} {IMAGE_PLACEHOLDER} placeholder(s) for {images} image(s)")
    else:  # with the marks that the model knows, as in LLaVA's run_llava.py
        prompt = prompt.replace(IMAGE_PLACEHOLDER, template.image_format.removesuffix("\n"))
    return template.turn_format.replace(_PROMPT, prompt)
