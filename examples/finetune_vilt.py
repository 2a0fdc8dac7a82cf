r"""Fine-tune ViLT for image-text matching with a congruence loss, and evaluate on Winoground.

    python -m examples.finetune_vilt --captions dataset_flickr30k.json --images flickr30k-images \
        --winoground winoground --model dandelin/vilt-b32-finetuned-flickr30k --loss cacr --output runs/cacr

On several GPUs: `torchrun --nproc-per-node 4 -m examples.finetune_vilt ...`. If a run was interrupted, the same
command continues it from the last checkpoint and ends with the same weights and numbers. `examples/ranking_data.py`
describes the data formats. `examples/make_tiny_data.py` makes tiny data and a checkpoint, to try it without any.
`docs/training.md` has a section on this example.

The task is that of CACR and IAIS: a query, its matched pair and 31 false ones, in both directions. Three things differ:

- The ranking loss is softmax cross-entropy over a query's candidates, which is how ViLT's authors fine-tuned this head
  (with 15 false captions). UNITER, and with it CACR and IAIS, uses a hinge with margin 0.2 on sigmoid scores.
- Negatives are drawn at random. Theirs are the 31 with the highest scores of 399 drawn at random.
- Here both sides of the congruence loss are added for each matched pair. Their codes use the language side where
  pictures are ranked and the vision side where captions are, and divide the ranking loss, but not the congruence loss,
  by the 4 batches accumulated. For each query, that corresponds to `--weight 2` here.

Steps, optimizer and schedules are otherwise those of CACR's released configuration. One query is 32 pairs, forward and
backward; --gradient-checkpointing and --bf16 save memory.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViltForImageAndTextRetrieval,
    ViltProcessor,
    set_seed,
)

import attncongruence
from attncongruence import (
    CONVENTIONS,
    CACRLoss,
    IAISLoss,
    Regularizer,
    exponential_warmup,
    regularize,
    winoground_scores,
)
from attncongruence.integrations.huggingface import CongruenceCallback, token_layout
from examples.ranking_data import Queries, rank_batch, read_flickr, read_winoground
from examples.run_folder import last_checkpoint, same_run

LOSSES = {"cacr": CACRLoss, "iais": IAISLoss}
WINOGROUND = ("text", "image", "group")
TRAINING = ("loss", "congruence_loss", "congruence_weight", "learning_rate", "grad_norm")


class ViltForRanking(ViltForImageAndTextRetrieval):
    """transformers' ViLT with its matching head, which has no loss of its own, plus softmax cross-entropy."""

    def forward(  # no **kwargs: with them Trainer would assume that this divides by num_items_in_batch
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Scores of all pairs, `(rankings, queries, candidates)`, and the loss.

        Args:
            input_ids: like the next four, one row for each pair; the candidates of a query are next to each other.
            attention_mask: see `input_ids`.
            token_type_ids: see `input_ids`.
            pixel_values: see `input_ids`.
            pixel_mask: see `input_ids`.
            labels: `(rankings, queries)`, index of the candidate that is the matched pair.
        """
        scores = super().forward(input_ids, attention_mask, token_type_ids, pixel_values, pixel_mask).logits
        scores = scores.view(*labels.shape, -1)
        # - log softmax(scores)[matched pair], mean over queries
        return {"loss": F.cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}


def matched_pairs(batch: Mapping[str, Tensor]) -> Tensor:
    """Which pairs of a batch are matched, `(pairs,)` bool. Only their attention should agree."""
    right = batch["labels"].flatten()
    candidates = torch.arange(len(batch["input_ids"]) // len(right), device=right.device)
    return (candidates == right[:, None]).flatten()


def add_congruence(model: ViltForRanking, processor: ViltProcessor, options: argparse.Namespace) -> Regularizer:
    """Add the congruence loss to the model's own loss; Trainer needs no change."""
    tokenizer, warmup = processor.tokenizer, exponential_warmup(options.steps)
    return regularize(
        model,
        LOSSES[options.loss](options.convention),
        # Words and patches without padding, [CLS] and [SEP], as the authors did. ViLT drops and shuffles patches, so
        # their positions are read from the captured layer.
        n_text=partial(token_layout, model, special=(tokenizer.cls_token_id, tokenizer.sep_token_id)),
        weight=lambda step: options.weight * warmup(step),
        positives=matched_pairs,
    )


def winoground(prediction: EvalPrediction) -> dict[str, float]:
    """Text, image and group score from scores of shape `(examples, captions, images)`."""
    return winoground_scores(torch.as_tensor(prediction.predictions))._asdict()


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(prog="examples.finetune_vilt", description=__doc__.splitlines()[0])

    def add(name: str, text: str, **settings: Any) -> None:
        shown = " (default: %(default)s)" if settings.get("default") is not None else ""
        parser.add_argument(name, help=text + shown, **settings)

    add("--captions", "dataset_flickr30k.json, or another of that form", type=Path, required=True)
    add("--images", "folder with its pictures", type=Path, required=True)
    add("--winoground", "folder with examples.jsonl and images/", type=Path, required=True)
    add("--model", "a ViLT checkpoint: a folder, or a name on the hub", required=True)
    add("--output", "folder for checkpoints and metrics.json", type=Path, required=True)
    add("--loss", "what is added to the ranking loss", choices=("none", *LOSSES), default="cacr")
    add("--convention", "of the congruence loss (default: released)", choices=CONVENTIONS)
    add("--weight", "of the congruence loss at the last step (default: 1)", type=float)
    add("--negatives", "false candidates of each query", type=int, default=31)
    add("--steps", "of the optimizer, and of the weight's exponential warm-up", type=int, default=5000)
    add("--queries", "in a forward pass, on each process", type=int, default=1)
    add("--accumulate", "forward passes before an optimizer step", type=int, default=8)
    add("--learning-rate", "highest learning rate of AdamW", type=float, default=5e-5)
    add("--log-every", "steps: log the losses", type=int, default=50)
    add("--save-every", "steps: evaluate on Winoground, write a checkpoint", type=int, default=500)
    add("--workers", "processes that load pictures, for each process that trains", type=int, default=2)
    add("--gradient-checkpointing", "compute activations twice instead of keeping them", action="store_true")
    add("--bf16", "bfloat16 autocast", action="store_true")
    add("--cpu", "use the CPU even if there is a GPU", action="store_true")
    add("--seed", "of all draws", type=int, default=0)
    options = parser.parse_args(arguments)

    if options.loss == "none" and (options.convention or options.weight is not None):
        parser.error("--loss none takes no --convention and no --weight: choose --loss cacr or iais, or leave them out")
    if options.loss != "none":
        options.convention = options.convention or "released"
        options.weight = 1.0 if options.weight is None else options.weight
        if not options.weight >= 0:
            parser.error(f"--weight {options.weight} must be 0 or more")
    for name in ("steps", "queries", "accumulate", "log_every", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more")
    if options.save_every % options.log_every:
        parser.error(
            f"--save-every {options.save_every} must be a multiple of --log-every {options.log_every}: a run that goes "
            "on from a checkpoint would log the mean of other steps"
        )
    return parser, options


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """CACR's released configuration, with the changes from the command line."""
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.queries,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        warmup_steps=10,
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=2.0,
        bf16=options.bf16,
        logging_steps=options.log_every,
        save_steps=options.save_every,
        eval_strategy="steps",
        eval_steps=options.save_every,
        per_device_eval_batch_size=8,
        save_total_limit=2,
        dataloader_num_workers=options.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=options.cpu or not torch.accelerator.is_available(),
        report_to="none",
        seed=options.seed,
    )


def recorded(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """Everything that the numbers of a run depend on, ready for JSON."""
    chosen = {name: value for name, value in vars(options).items() if name not in ("output", "workers")}
    paths = {name: str(value) for name, value in chosen.items() if isinstance(value, Path)}
    return chosen | paths | {"processes": processes}


def summary(trainer: Trainer, settings: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json."""
    rows = trainer.state.log_history
    return {
        "options": settings,
        "versions": {module.__name__: module.__version__ for module in (attncongruence, torch, transformers)},
        "training": [{name: row[name] for name in ("step", *TRAINING) if name in row} for row in rows if "loss" in row],
        "winoground": [
            {"step": row["step"]} | {name: row[f"eval_{name}"] for name in WINOGROUND}
            for row in rows
            if "eval_group" in row
        ],
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or continue training; write and return all numbers."""
    parser, options = parse(arguments)
    training = training_arguments(options)
    settings = recorded(options, training.world_size)
    metrics = options.output / "metrics.json"
    try:
        if training.n_gpu > 1:
            raise ValueError(
                f"one process sees {training.n_gpu} GPUs: start one for each, with torchrun --nproc-per-node "
                f"{training.n_gpu} -m examples.finetune_vilt, or show it one, with CUDA_VISIBLE_DEVICES=0"
            )
        pictures = read_flickr(options.captions, options.images)
        examples = read_winoground(options.winoground)
        total = options.steps * options.accumulate * training.train_batch_size * training.world_size
        queries = Queries(pictures, options.negatives, total, options.seed)
        family = AutoConfig.from_pretrained(options.model).model_type
        if family != "vilt":
            raise ValueError(f"--model {options.model} is of type {family!r}, and this example is about 'vilt'")
        with training.main_process_first(local=False):
            same_run(options.output, settings, write=training.process_index == 0)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if metrics.is_file():
        print(f"This run is complete: {metrics}")
        return json.loads(metrics.read_text())

    set_seed(options.seed)
    model = ViltForRanking.from_pretrained(options.model, dtype=torch.float32)
    processor = ViltProcessor.from_pretrained(options.model)
    if options.gradient_checkpointing:
        # transformers is renaming this method
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if options.loss != "none":
        add_congruence(model, processor, options)
    checkpoint = last_checkpoint(options.output, training.world_size)
    training.eval_on_start = checkpoint is None
    if checkpoint and training.process_index == 0:
        print(f"Continuing from {checkpoint}")
    trainer = Trainer(
        model,
        training,
        data_collator=rank_batch(processor, model.config.max_position_embeddings),
        train_dataset=queries,
        eval_dataset=examples,
        processing_class=processor,
        compute_metrics=winoground,
        callbacks=[] if options.loss == "none" else [CongruenceCallback()],
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if summary(trainer, settings)["winoground"][-1]["step"] < options.steps:
        trainer.evaluate()
    result = summary(trainer, settings)
    if trainer.is_world_process_zero():
        metrics.write_text(json.dumps(result, indent=1) + "\n")
        print(f"Winoground: {result['winoground'][-1]}\nAll numbers: {metrics}")
    return result


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        # Otherwise gloo's threads, which hold tensors, sometimes abort the process at exit (pytorch/pytorch#190489).
        torch.distributed.destroy_process_group()
