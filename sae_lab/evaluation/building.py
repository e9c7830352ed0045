"""The metrics of one's own that a config names."""

from omegaconf import DictConfig, OmegaConf

from sae_lab.evaluation.metrics import RowMetric, check_name
from sae_lab.runtime.build import build


def build_metrics(cfg: DictConfig) -> dict[str, RowMetric]:
    """Return the row metrics below `metric`, each a function with the arguments that its node holds.

    Raises:
        UserError: a node names no function, or has the name of another metric.
    """
    functions = {}
    for name in OmegaConf.select(cfg, "metric") or {}:
        check_name(str(name))
        node = {"_partial_": True} | dict(cfg.metric[name]) if OmegaConf.is_dict(cfg.metric[name]) else cfg.metric[name]
        functions[str(name)] = build(OmegaConf.create({"metric": {name: node}}), f"metric.{name}")
    return functions
