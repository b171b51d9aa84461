"""Every layout by name. A template that is `unseen` is never trained on."""

from dataclasses import dataclass

from train.synth.layouts import bars, figures, flags, form, invoice, lines, note, receipt, screen, sign, table, words
from train.synth.sheet import Layout


@dataclass(frozen=True)
class Template:
    """ems, most_ems: how wide a page this layout needs, and fills, in text sizes. dark: how often it has light ink on
    dark paper."""

    family: str
    variant: str
    draw: Layout
    unseen: bool
    ems: float
    most_ems: float
    dark: float

    @property
    def name(self) -> str:
        return f"{self.family}/{self.variant}"


def _family(name: str, module) -> tuple[Template, ...]:
    drawn = [(variant, draw, False) for variant, draw in module.SEEN.items()]
    drawn += [(variant, draw, True) for variant, draw in module.UNSEEN.items()]
    limits = module.EMS, module.MOST_EMS, module.DARK
    return tuple(Template(name, variant, draw, unseen, *limits) for variant, draw, unseen in drawn)


FAMILIES: dict[str, tuple[Template, ...]] = {
    name: _family(name, module)
    for name, module in (
        ("words", words),
        ("note", note),
        ("receipt", receipt),
        ("invoice", invoice),
        ("form", form),
        ("table", table),
        ("bars", bars),
        ("lines", lines),
        ("sign", sign),
        ("screen", screen),
        ("flags", flags),
        ("figures", figures),
    )
}
TEMPLATES = {template.name: template for templates in FAMILIES.values() for template in templates}
