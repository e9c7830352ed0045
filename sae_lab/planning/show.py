"""A plan as tables for people, at most 80 columns wide, and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sae_lab.planning.layouts import SAME, Option, fastest
from sae_lab.planning.plan import Plan
from sae_lab.runtime.plain_text import plural
from sae_lab.runtime.screen import console, gb, size_in_words

SHOWN = 6
"""Layouts in the table."""


def show(plan: Plan) -> None:
    """Print a plan of one run."""
    lm, chosen = plan.reading.lm, plan.chosen
    sae = plan.saes[0]
    console.print(
        f"{sae.n_latents:,} latents, {sae.parameters / 1e6:,.1f} M parameters, on {plan.reading.n_sources} x {lm.d:,}; "
        f"{plan.n_tokens:,} tokens",
        width=80,
    )
    console.print(f"rates: {', '.join(plan.rates.sources)}", width=80)
    console.print(memory_table(chosen), width=80)
    console.print(stage_table(chosen), width=80)
    console.print(layout_table(plan.fitting, chosen), width=80)
    console.print("\n".join(sentences(plan)), width=80)


def show_machine(name: str, choice: str, choices: Sequence[str]) -> None:
    """Print which machine is planned for, and how to type another one."""
    others = ", ".join(f"machine={other}" for other in choices if other != choice)
    console.print(f"For {name} (machine={choice}). Other machines: {others}.", width=80)


def memory_table(option: Option) -> Table:
    """Return what takes the memory of a device."""
    table = columns("memory of a device at its peak", "", "GB")
    for name, size in option.memory.items():
        table.add_row(name, gb(size))
    table.add_row("together", gb(sum(option.memory.values())))
    if option.lm_memory:
        table.add_row("on a device of the language model", gb(sum(option.lm_memory.values())))
    return table


def stage_table(option: Option) -> Table:
    """Return the tokens/s of each stage, on all devices of a layout."""
    table = columns(f"stages on {plural(option.layout.devices, 'device')}", "", "tokens/s", "share")
    total = sum(option.stages.values())
    for name, seconds in option.stages.items():
        limits = " (limits)" if name == option.limit else ""
        table.add_row(name + limits, f"{1 / seconds:,.0f}", f"{seconds / total:.0%}")
    table.add_row("the run", f"{1 / option.seconds_per_token:,.0f}", "")
    return table


def layout_table(options: Sequence[Option], chosen: Option) -> Table:
    """Return the layouts of least cost among those that fit, and the fastest."""
    table = columns("layouts: data x latents", "", "GB", "hours", "device-hours", "limited by")
    cheap = sorted(options, key=lambda o: o.device_hours)[: SHOWN - 1]
    for one in sorted({id(o): o for o in [*cheap, fastest(options), chosen]}.values(), key=lambda o: o.device_hours):
        mark = " *" if one is chosen else ""
        table.add_row(f"{one.layout}{mark}", gb(one.peak), hours(one.hours), hours(one.device_hours), one.limit)
    return table


def sentences(plan: Plan) -> list[str]:
    """Return what no table says."""
    chosen, fast, harvest = plan.chosen, fastest(plan.fitting), plan.harvest
    said = [f"* {duration(chosen.hours)}, start and evaluation included: {chosen.overrides}"]
    if idle := max(0, plan.gpus - chosen.layout.devices):
        said[0] += f". Of {plural(plan.gpus, 'device')} {idle:,} {'is' if idle == 1 else 'are'} idle."
    if SAME * fast.hours < chosen.hours:
        said.append(
            f"The fastest layout is {fast.layout}: {duration(fast.hours)}, {hours(fast.device_hours)} device-hours: "
            f"{fast.overrides}"
        )
    said.append(
        f"A cache of its activations takes {size_in_words(harvest.bytes)} of disk. Its harvest takes "
        f"{duration(harvest.hours)} on {plural(harvest.devices, 'device')}, start included: "
        f"{harvest.tokens_per_second:,.0f} tokens/s, limited by the {harvest.limit}."
    )
    if plan.exchange.bytes:
        parts = {name: size for name, size in plan.exchange._asdict().items() if name != "operations" and size}
        told = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in parts.items())
        said.append(f"A rank sends {plan.exchange.bytes / 1e6:,.1f} MB in a step ({told}).")
    sent = f" and send up to {plan.dead_candidates / 1e6:,.1f} MB more in a step" if plan.dead_candidates else ""
    said.append(f"Dead latents take up to {size_in_words(plan.dead_latents)} more{sent}.")
    return said


def show_sweep(plans: Sequence[Plan]) -> None:
    """Print the plans of a sweep in one table."""
    table = columns("the jobs of the sweep", "", "latents", "GB", "hours", "limited by")
    for plan in plans:
        sizes = sorted({sae.n_latents for sae in plan.saes})
        latents = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        table.add_row(plan.name, latents, gb(plan.chosen.peak), hours(plan.chosen.hours), plan.chosen.limit)
    device_hours = sum(plan.chosen.device_hours for plan in plans)
    table.add_row("all, one after the other", "", "", hours(sum(plan.chosen.hours for plan in plans)), "")
    console.print(table, width=80)
    what = "cache" if plans[0].cached else "language model"
    passes = plural(len(plans), "pass", "passes")
    console.print(f"{passes} over the {what}, {hours(device_hours)} device-hours.", width=80)


def columns(title: str, *names: str) -> Table:
    """Return an empty table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", min_width=len(title))
    for name in names:
        text = name in ("", "limited by")
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    return table


def duration(n: float) -> str:
    """Return a number of hours in words, in minutes or seconds if it is short."""
    unit, size = ("hour", 1) if n >= 1 else ("minute", 60) if 60 * n >= 1 else ("second", 3600)
    number = hours(size * n)
    return f"{number} {unit}" if number == "1" else f"{number} {unit}s"


def hours(n: float) -> str:
    """Return hours, with two digits at least."""
    return f"{n:,.3g}" if n < 100 else f"{n:,.0f}"


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the numbers of a plan by name."""
    return {
        "name": plan.name,
        "n_tokens": plan.n_tokens,
        "n_latents": [sae.n_latents for sae in plan.saes],
        "parameters": [sae.parameters for sae in plan.saes],
        "chosen": option_as_json(plan.chosen),
        "layouts": [option_as_json(option) for option in plan.options],
        "exchange": plan.exchange._asdict(),
        "dead_candidates": plan.dead_candidates,
        "cache_bytes": plan.harvest.bytes,
        "harvest": plan.harvest._asdict(),
        "rates": list(plan.rates.sources),
    }


def option_as_json(option: Option) -> dict[str, Any]:
    """Return the numbers of a layout by name."""
    return {
        "layout": option.layout._asdict(),
        "overrides": option.overrides,
        "memory": option.memory,
        "lm_memory": option.lm_memory,
        "tokens_per_second": {name: 1 / seconds for name, seconds in option.stages.items()},
        "tokens_per_second_of_run": 1 / option.seconds_per_token,
        "limit": option.limit,
        "hours": option.hours,
        "device_hours": option.device_hours,
    }
