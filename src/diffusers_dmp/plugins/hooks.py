"""Forward hooks on modules that other libraries define, which compiled code notices as well."""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from torch import nn


class ForwardHooks:
    """
    Hooks that run before and after the forward passes of some modules, and are removed together.

    These are PyTorch's hooks. Diffusers' `ModelHook` and `HookRegistry` are not used: a copy of a module with a registry
    computes with the original's weights, the module cannot be pickled, no hook runs where a forward pass raises an
    exception, and attributes remain on the module after removal.

    `torch.compile` checks whether a module has got a `forward` of its own since it was compiled, but not whether a module
    without hooks has got hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`). Each module therefore gets a `forward`
    of its own, which does what its `forward` did before. Code that was compiled without the hooks no longer applies, code
    that was compiled with them applies again when they return, and no other model is compiled again.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._handles: list[Any] = []
        self._surrounded: list[nn.Module] = []
        self._removed = False

    def before(self, module: nn.Module, hook: Callable, first: bool = False) -> None:
        """
        Add a hook that runs before `module`.

        Args:
            module (`nn.Module`): The module.
            hook (`Callable[[nn.Module, tuple, dict], tuple[tuple, dict] | None]`): Gets the module and its arguments. May
                return other arguments.
            first (`bool`): Run the hook before the module's other ones.
        """
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first))
        self._mark(module)

    def after(self, module: nn.Module, hook: Callable, always_call: bool = False) -> None:
        """
        Add a hook that runs after `module`.

        Args:
            module (`nn.Module`): The module.
            hook (`Callable[[nn.Module, tuple, Any], Any]`): Gets the module, its positional arguments and its output. May
                return another output.
            always_call (`bool`): Run the hook with the output `None` if the forward pass raises an exception.
        """
        self._handles.append(module.register_forward_hook(hook, always_call=always_call))
        self._mark(module)

    def around(self, module: nn.Module, function: Callable) -> None:
        """
        Put a function around the `forward` of `module`.

        What others put around it later, such as Diffusers' caches, sees what the function returns; what they had put around
        it before is inside.

        Args:
            module (`nn.Module`): The module.
            function (`Callable[[Callable, …], Any]`): Gets what `forward` was, and the arguments of the call.
        """
        forward = module.forward
        was_own = "forward" in vars(module)
        # pipelines read its signature
        module.forward = update_wrapper(partial(_call_around, self, function, forward, was_own), forward)  # type: ignore[method-assign]
        self._surrounded.append(module)

    def remove(self) -> None:
        """Remove all hooks and every other trace of them."""
        self._removed = True  # for functions that stay inside what others have put around them
        for module in reversed(self._surrounded):
            self._remove_around(module)
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            _remove_own_forward(module)
        for module in [*self._modules, *self._surrounded]:
            _remove_what_others_left(module)
        self._handles, self._modules, self._surrounded = [], [], []

    def _remove_around(self, module: nn.Module) -> None:
        surrounding = vars(module).get("forward")
        if isinstance(surrounding, partial) and surrounding.func is _call_around and surrounding.args[0] is self:
            _, _, forward, was_own = surrounding.args
            if was_own:
                module.forward = forward  # type: ignore[method-assign]
            else:
                del module.forward
        # else others have wrapped it in the meantime, and it stays inside theirs without a function

    def _mark(self, module: nn.Module) -> None:
        if module not in self._modules:
            _set_own_forward(module)
            self._modules.append(module)


def functions_around(module: nn.Module) -> list[Callable]:
    """
    List what runs before, after and around the `forward` that a module's class defines.

    Returns:
        `list[Callable]`: PyTorch's hooks, the functions of [`ForwardHooks.around`], and any other `forward` of the module's own,
        such as one that offloads its weights.
    """
    functions = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    forward = vars(module).get("forward")
    while isinstance(forward, partial) and forward.func in (_call_around, _call_forward):
        if forward.func is _call_forward:
            forward = forward.args[0]
            continue
        hooks, function, forward, _ = forward.args
        functions += [] if hooks._removed else [function]
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        functions.append(forward)
    return functions


def _call_around(
    hooks: ForwardHooks, function: Callable, forward: Callable, was_own: bool, *args: Any, **kwargs: Any
) -> Any:
    return forward(*args, **kwargs) if hooks._removed else function(forward, *args, **kwargs)


def _set_own_forward(module: nn.Module) -> None:
    forward = module.forward
    if "forward" in vars(module):  # group offloading, for example, has set one already
        forward = update_wrapper(partial(_call_forward, forward), forward)  # pipelines read its signature
    module.forward = forward


def _remove_own_forward(module: nn.Module) -> None:
    forward = vars(module).get("forward")
    if isinstance(forward, partial) and forward.func is _call_forward:
        module.forward = forward.args[0]
    elif getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
    # else others have wrapped it in the meantime, and it stays inside theirs


def _remove_what_others_left(module: nn.Module) -> None:
    """Remove the forwards of plugins that were removed while another plugin's forward was around theirs."""
    forward = vars(module).get("forward")
    while isinstance(forward, partial) and forward.func is _call_around and forward.args[0]._removed:
        _, _, module.forward, was_own = forward.args
        if not was_own:
            del module.forward
        forward = vars(module).get("forward")
    # one without hooks serves nobody any more
    is_plain = getattr(forward, "__func__", None) is type(module).forward
    if is_plain and not module._forward_hooks and not module._forward_pre_hooks:
        del module.forward


def _call_forward(forward: Callable, *args, **kwargs) -> Any:
    return forward(*args, **kwargs)
