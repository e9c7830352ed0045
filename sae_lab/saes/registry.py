"""SAEs by the names of their classes: how a file describes one, and how it is built again."""

import inspect
from typing import Any, ClassVar

from torch import nn

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError


class Registered(nn.Module):
    """Every subclass that can be built is known by its name, and its constructor checks its settings.

    Every constructor argument is kept as an attribute of the same name: `config` collects them.
    """

    registry: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = check_arguments(cls.__init__)  # type: ignore[method-assign]
        if not inspect.isabstract(cls):
            Registered.registry[cls.__name__] = cls

    @classmethod
    def arguments(cls) -> list[str]:
        """The names of the constructor's arguments, with those that it passes on to the classes it builds on."""
        names: dict[str, None] = {}
        for base in cls.__mro__:
            if base is Registered:
                break
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            own = "__init__" in vars(base)
            names |= {p.name: None for p in parameters if own and p.name != "self" and p.kind is not p.VAR_KEYWORD}
        return list(names)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: plain types, enough to build this SAE again."""
        return {name: getattr(self, name) for name in self.arguments()}

    @classmethod
    def from_config(cls, name: str, config: dict[str, Any]) -> Any:
        """An untrained SAE of the registered class `name`.

        Raises:
            UserError: no such class (a file can name a class, never import one), or arguments it does not take.
        """
        if name not in cls.registry:
            known = ", ".join(sorted(cls.registry))
            raise UserError(f"there is no SAE class {name!r} among {known}: import the module that defines it first.")
        try:
            return cls.registry[name](**config)
        except TypeError as e:
            raise UserError(f"{name} cannot be built from this config: {e}") from e
