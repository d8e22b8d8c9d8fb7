"""The families of strategies, and when to use each strategy: the texts of docs/strategies.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A heading of the page, a sentence below it, and for each strategy when to use it."""

    title: str
    idea: str
    when: dict[str, str]


FAMILIES = (
    Family(
        "References",
        "Floor and ceilings. Compare every method with these first.",
        {
            "naive": "The floor: no measure against forgetting.",
            "joint": "The ceiling of every comparison.",
            "cumulative": "A ceiling with a curve over stages; its cost grows with the tasks.",
        },
    ),
    Family(
        "Rehearsal",
        "Examples of earlier tasks, kept or generated, take part in each step. With one set of "
        "weights for all tasks, the strongest family on both streams of the leaderboard.",
        {
            "replay": "The first method to try if old examples may be kept.",
            "hard_replay": "A small buffer: keeps the hardest examples, or draws the most "
            "forgotten ones.",
            "inscl": "Many tasks with similar instructions: replays more of the most different "
            "ones.",
            "multitask": "Tasks of unequal size or with conflicting gradients: weighs the "
            "current and the remembered tasks.",
            "der": "Keeps behaviour as well as labels; memory grows with the length of responses.",
            "lamol": "Old examples may not be kept, but the model may generate them.",
        },
    ),
    Family(
        "Distillation",
        "An earlier model, or the model with the answer in its prompt, is the teacher. No old "
        "examples.",
        {
            "lwf": "New tasks whose inputs resemble those of earlier tasks.",
            "asft": "A strong pretrained model that must not move far from its base.",
            "sdft": "A model that follows demonstrations in its prompt; three times the cost of "
            "a plain step.",
        },
    ),
    Family(
        "Regularisation",
        "A penalty holds the weights that earlier tasks need. Constant memory, low cost; the "
        "strength must be tuned for each model.",
        {
            "l2": "The simplest penalty: a baseline for the others.",
            "ewc": "Few tasks and enough data for a Fisher estimate.",
            "online_ewc": "As `ewc` for long streams: older tasks fade.",
            "mas": "No labels for the importance; the best of this family on both streams.",
            "si": "No extra pass at the end of a stage: importance comes from the training path.",
            "rwalk": "Combines `online_ewc` and `si`; more memory within a stage.",
        },
    ),
    Family(
        "Gradients",
        "A step is projected so that it does not harm earlier tasks. Exact only under "
        "`train.optimizer=sgd`.",
        {
            "gem": "Few tasks and a buffer: one gradient for each earlier task and step.",
            "agem": "As `gem` with one gradient for all tasks; combine it with a replay share.",
            "ogd": "No old examples, but memory for one gradient of each stored example.",
            "osf": "Full fine-tuning of a pretrained model without any memory.",
        },
    ),
    Family(
        "Sparse updates",
        "A stage changes only a part of the weights.",
        {
            "sparse": "Each task needs few weights; `protected_fraction` avoids those of earlier "
            "tasks.",
            "migu": "Wide linear layers, and no memory: only the most active neurons learn.",
        },
    ),
    Family(
        "Adapters",
        "Tasks get weights of their own: adapters, blocks of one LoRA, or prompts.",
        {
            "per_task": "The task is known at test time: no forgetting; memory grows with the "
            "tasks.",
            "router": "As `per_task` without the task's name; instructions must differ.",
            "incremental_lora": "A baseline for the LoRA methods below.",
            "olora": "LoRA blocks for each task, kept orthogonal; one model at test time.",
            "gain_lora": "LoRA blocks for each task, with gates chosen by the prompt.",
            "slao": "A single LoRA of constant size, merged after each task.",
            "progressive_prompts": "A large frozen model and a known task at test time; very "
            "small memory.",
        },
    ),
    Family(
        "Merging",
        "Stages are trained almost freely and their weights are merged afterwards. Needs a "
        "pretrained model whose stages stay close to each other.",
        {
            "average": "The baseline of merging.",
            "ema": "A smoothed model for evaluation, without a change to training.",
            "fisher_merge": "As `average`, weighted by what each task needs.",
            "task_arithmetic": "Tasks learned from one base, to be combined later.",
            "ties": "As `task_arithmetic` for tasks whose changes conflict.",
        },
    ),
    Family(
        "Meta-learning",
        "Training prepares for fast adaptation, or for less interference. Combine with "
        "`stream.arrange=episodes` and `continual adapt`.",
        {
            "maml": "Prepare a model for new tasks of the same kind; best with "
            "`second_order=true`.",
            "anil": "As `maml` at lower cost: the inner loop changes the head only.",
            "meta_sgd": "As `maml` with learned rates; first order suffices for adaptation.",
            "reptile": "The strongest of this family as continual learning, without a query set.",
            "la_maml": "Learned rates against interference; needs `train.optimizer=sgd`.",
        },
    ),
    Family(
        "Other libraries",
        "A plugin of another library in this engine's stage.",
        {"avalanche": "A method that only Avalanche has, or a comparison with its version."},
    ),
)
