"""Help texts of the commands."""

from __future__ import annotations

HELP = """continual: continual instruction learning of language models.

Tasks arrive one after another; each is learned in one masked-SFT stage under one strategy; after every stage all tasks
are scored, and the scores are the retained-task matrix.

  continual compare [key=value ...]   strategies x seeds x orders over one stream, side by side
  continual run     [key=value ...]   one strategy over one stream
  continual adapt   [key=value ...]   one new task, from a checkpoint or a base model: curves over steps and shots
  continual plan    [key=value ...]   memory, FLOPs, hours and disk of a run, before it is begun
  continual audit   [key=value ...]   what is amiss in a stream's rows: repeated, leaked, contradictory, too long
  continual export  RUN [key=value ...]   the model after a stage, as a folder that transformers or peft loads
  continual chat    RUN [key=value ...]   talk to it in the terminal, as it was after any of its stages
  continual watch   PATH...           live runs, followed in the terminal
  continual report  PATH...           tables, report.html and curves.png again, from folders on disk
  continual verify  PATH...           every summary of published matrices, recomputed in all published forms
  continual list    [strategies|streams|models|probes] [json=true]   what there is
  continual completion bash|zsh|fish   a script that makes the shell complete commands, keys and choices
  continual --version

Keys: stream=NAME  strategy=NAME or strategy=[A,B]  model=NAME  seed=N  device=auto|cpu|cuda|mps  out=DIR
      train.*  loss.*  data.*  score.*  strategy.NAME.*  stream.*  model.*
The same out= twice resumes. continual VERB --help shows examples; continual VERB --cfg the whole configuration."""
VERB_HELP = {
    "compare": """continual compare [key=value ...]: several strategies over one stream -> a comparison folder.

  continual compare                                        five strategies and joint training on the embedded stream
  continual compare strategy=naive,[replay,ewc] seed=0,1,2 commas sweep, brackets compose
  continual compare strategy=ewc strategy.ewc.strength=1,100,10000
  continual compare stream=folder stream.path=DIR stream.order=order1,order3 score.split=dev model=scratch
  continual compare hydra/launcher=joblib                  spread by any Hydra launcher that is installed""",
    "run": """continual run [key=value ...]: one strategy over one stream -> a run folder.

  continual run strategy=replay out=runs/replay            and the same again to resume it
  continual run strategy=[replay,ewc] strategy.replay.share=0.5
  continual run model=hf model.name=Qwen/Qwen3-0.6B model.adapter=lora data.template=chat train.lr=1e-4
  continual run stream=folder stream.path=DIR stream.tasks=[a,b] stream.max_train_rows=500 score.split=dev
  continual run score.every_steps=20 'stop_if.forgetting>0.2'   forgetting seen within a stage, and an end to it
  continual run stream.arrangement=joint                   the ceiling: all tasks at once
  continual run probe=[wordings,shots]                     measure robustness and k-shot beside the matrix""",
    "adapt": """continual adapt [key=value ...]: one new task from a checkpoint -> its curves, and the adapted model.

  continual adapt checkpoint=runs/maml task=NEW            from a run's last checkpoint
  continual adapt checkpoint=runs/maml/checkpoints/stage-03 task=NEW
  continual adapt checkpoint=base task=NEW                 from the base model: the reference to compare with
  continual adapt checkpoint=runs/maml stream=folder stream.path=DIR task=NEW adapt.shots=[16,64] adapt.draws=5""",
    "plan": """continual plan [key=value ...]: what a run with these keys would take, and what grows with its tasks.

  continual plan strategy=ewc                              the default stream and model
  continual plan stream=folder stream.path=DIR model=hf model.name=DIR strategy=replay plan.memory_gb=80
  continual plan model=hf model.name=docs/llama-3.1-8b plan.num_tasks=1000 plan.gpus=64 plan.peak_flops=989e12
  continual plan model=hf model.name=DIR plan.num_tasks=20 plan.train_examples=5000 plan.tokens_per_example=300 plan.response_tokens=8""",
    "audit": """continual audit [key=value ...]: what is amiss in a stream's rows, as run tells it at its start.

  continual audit stream=folder stream.path=DIR score.split=dev   repeats, leaks, conflicts, one-sided answers
  continual audit model=hf model.name=Qwen/Qwen3-0.6B             and lengths in its tokens; no weights are read""",
    "export": """continual export RUN [key=value ...]: the model of a run or adaptation -> a folder with a model card.

  continual export runs/replay                             as it is at the run's end, to runs/replay/export/STAGE
  continual export runs/replay stage=reverse out=models/reverse license=apache-2.0
  continual export runs/lora merged=false                  a peft adapter for its base, instead of a whole model
  continual export runs/per_task task=reverse              where a strategy has other weights for each task""",
    "chat": """continual chat RUN [key=value ...]: prompts from the terminal or a pipe, answered; /help says the rest.

  continual chat runs/naive                                then /task NAME, /example, /compare: what was forgotten
  continual chat runs/naive stage=reverse max_new_tokens=50
  echo 'Reverse the words: red blue' | continual chat runs/naive""",
    "watch": """continual watch PATH...: a line for each run of these folders, until all are over or Ctrl-C.

  continual watch runs/compare                             a comparison's runs, those too that have not begun
  continual watch runs/a runs/b every=5                    looked at every 5 seconds
  continual watch runs/compare once=true                   as they are now; so too where there is no terminal""",
    "report": """continual report PATH...: the tables, report.html and curves.png of runs, comparisons or adaptations.

  continual report runs/compare
  continual report runs/a runs/b runs/c out=runs/abc       a comparison of finished runs
  continual report runs/new-base runs/new-maml out=runs/new   adaptations: what each start needs to reach the base""",
    "verify": """continual verify PATH...: every summary of matrices, each in its published forms, recomputed.

  continual verify matrix.json other/matrix.json           a run's, or anyone's
  continual verify runs/compare                            a run, a comparison, a folder of .json and .csv files
  continual verify scores.csv json=true                    for machines

A CSV has a first line 'stage,TASK,...', then a line a stage, named by the task that was learned in it (or base), a cell
a task: in [0, 1], empty where not measured; 'stage (percent)' says that it is in percent. A line 'counts,N,...' may
hold the numbers of test examples.""",
    "list": """continual list [strategies|streams|models|probes]: what there is, one line each.

  continual list strategies                                those of installed packages too
  continual list strategies json=true                      for machines""",
    "completion": """continual completion bash|zsh|fish: print the script by which this shell completes continual's words.

  eval "$(continual completion bash)"                      in ~/.bashrc
  eval "$(continual completion zsh)"                       in ~/.zshrc, after compinit
  continual completion fish > ~/.config/fish/completions/continual.fish""",
}
