"""The same small training job with gradkeel and with each peer, as its own documentation shows it.

Each contender takes (micro-batches, micro-batches a window, bound or None) and returns the final weights.
"""

import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import gradkeel as gk

Batch = tuple[Tensor, Tensor]
LR = 0.5


def make_model() -> nn.Linear:
    """One linear layer, always with the same weights."""
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def make_batches(counts: Sequence[int]) -> list[Batch]:
    """Micro-batches of so many items; the targets differ by micro-batch, so that weighting matters."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator), torch.full((n, 1), float(i + 1)))
        for i, n in enumerate(counts)
    ]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What torch's criteria return by default."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def exact(batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    """The oracle."""
    model = make_model().double()
    for start in range(0, len(batches), steps):
        window = batches[start : start + steps]
        x, y = (torch.cat([b[i] for b in window]).double() for i in (0, 1))
        if not len(x):
            continue
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(mean_loss(model, (x, y)), [*model.parameters()])]
        )
        coefficient = 1.0 if bound is None else min(1.0, bound / float(gradient.norm()))
        with torch.no_grad():
            vector = nn.utils.parameters_to_vector(model.parameters()) - LR * coefficient * gradient
            nn.utils.vector_to_parameters(vector, model.parameters())
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def with_gradkeel(batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    """README's loop."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    guard = gk.attach(optimizer, None if bound is None else gk.ClipByGlobalNorm(bound), model=model)
    for micro in (accumulate := gk.Accumulator(guard, steps, reduction="mean"))(batches):
        with micro:
            micro.backward(mean_loss(model, micro.batch), weight=len(micro.batch[0]))
        if micro.closes_window:
            optimizer.step()
            optimizer.zero_grad()
    assert accumulate.guard is guard
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def with_torch(batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    """The idiom of torch's own recipes: loss / steps, a clip and a step after every so many."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for i, batch in enumerate(batches):
        (mean_loss(model, batch) / steps).backward()
        if (i + 1) % steps == 0:
            if bound is not None:
                nn.utils.clip_grad_norm_(model.parameters(), bound)
            optimizer.step()
            optimizer.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


class _Loader(torch.utils.data.Dataset[Batch]):
    """The micro-batches as a data set, for peers that want a DataLoader."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        return self._batches[index]


def _loader(batches: list[Batch]) -> torch.utils.data.DataLoader[Batch]:
    return torch.utils.data.DataLoader(_Loader(batches), batch_size=None)


def with_accelerate(batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    """Accelerate's guide to gradient accumulation."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=steps, cpu=True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model, optimizer, loader = accelerator.prepare(model, optimizer, _loader(batches))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(mean_loss(model, batch))
            if accelerator.sync_gradients and bound is not None:
                accelerator.clip_grad_norm_(model.parameters(), bound)
            optimizer.step()
            optimizer.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def with_accelerate_by_items(batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    """The same guide on samples of variable size: the window's items are counted before its first backward."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=steps, cpu=True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model, optimizer, loader = accelerator.prepare(model, optimizer, _loader(batches))
    iterator = iter(loader)
    for start in range(0, len(batches), steps):
        window = [next(iterator) for _ in range(min(steps, len(batches) - start))]
        items = accelerator.gather(torch.tensor(sum(len(batch[0]) for batch in window))).sum().item()
        for batch in window:
            loss = nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum")
            accelerator.backward(loss * steps * accelerator.num_processes / items)
        if bound is not None:
            accelerator.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def with_lightning(batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    """Lightning's automatic optimization with accumulate_grad_batches."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_model()

        def training_step(self, batch: Batch, _: int) -> Tensor:
            return mean_loss(self.layer, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=steps,
        gradient_clip_val=bound,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _loader(batches))
    return nn.utils.parameters_to_vector(module.layer.parameters()).detach()


def with_transformers(batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    """The Transformers Trainer with gradient_accumulation_steps and a model that returns its mean loss."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_model()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": mean_loss(self.layer, (x, labels))}

    return _with_trainer(Model(), batches, steps, bound)


def with_transformers_items(batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    """The same with a model that divides its sum by num_items_in_batch, as the library's own language models do."""

    class Model(nn.Module):
        accepts_loss_kwargs = True

        def __init__(self) -> None:
            super().__init__()
            self.layer = make_model()

        def forward(
            self, x: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None
        ) -> dict[str, Tensor]:
            total = nn.functional.mse_loss(self.layer(x), labels, reduction="sum")
            return {"loss": total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)}

    return _with_trainer(Model(), batches, steps, bound)


def _with_trainer(model: nn.Module, batches: list[Batch], steps: int, bound: float | None) -> Tensor:
    import transformers

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> torch.utils.data.DataLoader[Batch]:
            return self.accelerator.prepare(_loader([{"x": x, "labels": y} for x, y in batches]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            use_cpu=True,
            num_train_epochs=1,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0 if bound is None else bound,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        Trainer(model, arguments, train_dataset=_Loader(batches), optimizers=(optimizer, None)).train()
    return nn.utils.parameters_to_vector(model.layer.parameters()).detach()


Train = Callable[[list[Batch], int, float | None], Tensor]
TRAINERS: dict[str, Train] = {
    "gradkeel": with_gradkeel,
    "torch idiom": with_torch,
    "Accelerate": with_accelerate,
    "Accelerate, samples of variable size": with_accelerate_by_items,
    "Lightning": with_lightning,
    "Transformers": with_transformers,
    "Transformers, loss by num_items_in_batch": with_transformers_items,
}
