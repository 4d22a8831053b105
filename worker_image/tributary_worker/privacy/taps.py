"""Taps on the outputs of the trained layers: they see what a layer was given and the gradient at its output.

A backward pass that is only asked for the gradient of the taps' common anchor runs through all of them and
computes no gradient of any parameter, so none of DeepSpeed's hooks fires. What a tap keeps is saved like any
activation: it costs no memory of its own, and with gradient checkpointing it is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tributary_worker.privacy.errors import PrivacyError, UnsupportedError
from tributary_worker.privacy.layers import Rule, rule_for
from tributary_worker.privacy.parts import Part

Sink = Callable[[int, Part], None]
"""Takes a part of the gradient of the parameter of that index."""
NAMES_SHOWN_MAX = 5


@dataclass(frozen=True, slots=True)
class TappedLayer:
    """A layer with trained parameters: the index and the rule of each."""

    name: str
    module: nn.Module
    rules: tuple[tuple[int, Rule], ...]


def tapped_layers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[TappedLayer]:
    """Every layer that holds one of `parameters`; a tied one has several.

    Raises: UnsupportedError: a trainable parameter is of a kind that has no rule; it names it.
    """
    places = {id(parameter): index for index, parameter in enumerate(parameters)}
    layers, refused = [], []
    for name, module in model.named_modules():
        own = [(n, places[id(p)]) for n, p in module.named_parameters(recurse=False) if id(p) in places]
        rules = [(index, rule_for(module, n)) for n, index in own]
        refused += [f"{name}.{n} ({type(module).__name__})" for n, _ in own if rule_for(module, n) is None]
        if own:
            layers.append(TappedLayer(name, module, tuple((i, r) for i, r in rules if r is not None)))
    if refused:
        shown = ", ".join(refused[:NAMES_SHOWN_MAX])
        raise UnsupportedError(f"no gradient per record for trainable parameters: {shown}: freeze them")
    return layers


def run_tapped(
    layers: Sequence[TappedLayer], losses: Callable[[], Tensor], batch_size: int, sink: Sink
) -> None:
    """One forward and one backward pass of the summed losses, with every part of the gradients of all records
    given to `sink`. `losses()` gives (batch,).

    Raises: PrivacyError: a layer had no part in the losses: it would train on noise alone, unnoticed.
    """
    reached: set[int] = set()

    def receive(layer: TappedLayer, given: Tensor, gradient: Tensor) -> None:
        for index, rule in layer.rules:
            reached.add(index)
            sink(index, rule(layer.module, given, gradient))

    anchor = torch.zeros((), requires_grad=True)
    with _taps(layers, batch_size, anchor, receive), torch.enable_grad():
        values = losses()
        if values.shape != (batch_size,):
            raise PrivacyError(
                f"the objective gave losses of shape {tuple(values.shape)} for {batch_size} records"
            )
        if values.requires_grad:
            torch.autograd.grad(values.sum(), anchor, allow_unused=True)
    unused = [layer.name for layer in layers if not all(index in reached for index, _ in layer.rules)]
    if unused:
        shown = ", ".join(unused[:NAMES_SHOWN_MAX])
        raise UnsupportedError(f"the losses do not depend on {shown}: they cannot be trained")


Receive = Callable[[TappedLayer, Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity, which hands over the gradient that passes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _anchor: Tensor, given: Tensor, receive: Any) -> Tensor:
        ctx.save_for_backward(given)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # Detached: who keeps it must not keep the graph behind it.
        ctx.receive(ctx.saved_tensors[0].detach(), gradient)
        return gradient, None, None, None


@contextmanager
def _taps(layers: Sequence[TappedLayer], batch_size: int, anchor: Tensor, receive: Receive) -> Iterator[None]:
    with ExitStack() as hooks:
        for layer in layers:
            before = partial(_give_each_record_its_own, layer, batch_size)
            hooks.callback(layer.module.register_forward_pre_hook(before).remove)
            after = partial(_tap_output, anchor, partial(receive, layer))
            hooks.callback(layer.module.register_forward_hook(after).remove)
        yield


def _give_each_record_its_own(
    layer: TappedLayer, batch_size: int, _module: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """What all records share, such as the positions of GPT-2, is repeated, so that the gradient at the output
    keeps them apart."""
    if not inputs or not isinstance(inputs[0], Tensor):
        raise UnsupportedError(f"{layer.name} is not called with a tensor first: freeze it")
    given, *others = inputs
    if given.shape[0] == 1:
        given = given.expand(batch_size, *given.shape[1:])
    if given.shape[0] != batch_size:
        raise UnsupportedError(
            f"{layer.name} is called with {given.shape[0]} rows for {batch_size} records, so that they "
            "cannot be told apart: leave it out of method.lora.targetModules"
        )
    return (given, *others)


def _tap_output(
    anchor: Tensor, receive: Callable[[Tensor, Tensor], None], _module: nn.Module, inputs: Any, output: Tensor
) -> Tensor:
    tapped: Tensor = _Tap.apply(output, anchor, inputs[0], receive)
    return tapped
