"""Say what a run or a sweep takes before it is started: `python -m sae_lab.plan lm=gemma2_2b n_tokens=4e9 gpus=8`."""

from pathlib import Path
from typing import Annotated, TypedDict

from annotated_types import Ge, Gt, Le
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.cli.one_run import take_sweep


class Options(TypedDict):
    """The options of conf/plan.yaml that are none of a run."""

    gpus: Annotated[int, Ge(1), Le(1_000_000)]
    rates: str | list[str]
    memory: Annotated[float, Gt(0)] | None
    out: str | None
    sweep: list[str]


@entry_point("plan", take_sweep)
def main(cfg: DictConfig) -> None:
    from sae_lab.cli.help import group_options
    from sae_lab.planning.asked import with_least_devices
    from sae_lab.planning.plan import known_models, plan_stream
    from sae_lab.planning.show import as_json, show, show_machine, show_sweep
    from sae_lab.planning.sweep import SHARED, by_stream, job_configs
    from sae_lab.runtime.checks import check_config
    from sae_lab.runtime.files import check_out, write_json
    from sae_lab.training.options import check_options

    check_config(cfg, Options)
    if cfg.out is not None:
        check_out(Path(cfg.out))
    hydra = HydraConfig.get()
    shared = hydra.runtime.choices["hydra/launcher"] == SHARED
    configs = job_configs("plan", hydra.overrides.task, cfg.sweep) if cfg.sweep else {"": cfg}
    for config in configs.values():
        check_options(with_least_devices(config))
    known = known_models()
    plans = [plan_stream("\n".join(group), [*group.values()], known) for group in by_stream(configs, shared)]
    show_machine(cfg.machine.name, hydra.runtime.choices["machine"], group_options("machine"))
    if cfg.sweep:
        show_sweep(plans)
    else:
        show(plans[0])
    if cfg.out is not None:
        write_json(Path(cfg.out), {"streams": [as_json(plan) for plan in plans]})


if __name__ == "__main__":
    main()
