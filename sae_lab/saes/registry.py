"""Registry of SAEs by class name, from which saved SAEs are built again."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError


class Registered(nn.Module):
    """Module whose subclasses are registered by class name, and whose constructors check their settings.

    A subclass must keep every constructor argument as an attribute of the same name, which `config` collects.
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
        """Return the names of the constructor's arguments, including those of its base classes."""
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
        """Constructor arguments of this SAE, as plain types, from which it can be built again."""
        return {name: getattr(self, name) for name in self.arguments()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an untrained SAE of this class from the constructor's arguments, such as `sae.config`.

        Raises:
            UserError: the class does not take these arguments.
        """
        try:
            return cls(**config)
        except TypeError as e:
            raise UserError(f"{cls.__name__} cannot be built from this config: {e}") from e

    @classmethod
    def by_name(cls, name: str, config: Mapping[str, Any]) -> Any:
        """Build an untrained SAE of the registered class `name`.

        Raises:
            UserError: the class is not registered (a file can name a class, but never import one), or does not take
                these arguments.
        """
        if name not in cls.registry:
            known = ", ".join(sorted(cls.registry))
            raise UserError(
                f"there is no SAE class {name!r}, expected one of {known}: if it is your own, import its module first."
            )
        return cls.registry[name].from_config(config)
