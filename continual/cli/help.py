"""Help texts of the commands."""

from __future__ import annotations

HELP = """\
continual: continual instruction learning of language models.

Tasks arrive one after another; each is learned in one masked-SFT stage under one strategy; after
every stage all tasks are scored, and the scores are the retained-task matrix.

  continual compare [key=value ...]   strategies x seeds x orders over one stream, side by side
  continual run     [key=value ...]   one strategy over one stream
  continual adapt   [key=value ...]   one new task, from a checkpoint or a base model:
                                      curves over steps and shots
  continual plan    [key=value ...]   memory, FLOPs, hours and disk that a run would take
  continual audit   [key=value ...]   problems in a stream's rows: repeats, leaks, conflicts
  continual export  RUN [key=value ...]   the model after a stage, as a folder that
                                      transformers or peft loads
  continual chat    RUN [key=value ...]   chat with the model after any of its stages
  continual watch   PATH...           follow live runs in the terminal
  continual report  PATH...           write tables, report.html and curves.png from run folders
  continual verify  PATH...           recompute every summary of published matrices
  continual list    [strategies|streams|models|probes] [json=true]   list what can be chosen
  continual completion bash|zsh|fish  shell completion of commands, keys and choices
  continual --version

Keys: stream=NAME  strategy=NAME or strategy=[A,B]  model=NAME  seed=N  out=DIR
      device=auto|cpu|cuda|mps  train.*  loss.*  data.*  score.*  strategy.NAME.*  stream.*  model.*
The same out= again resumes a run. continual VERB --help shows examples, and continual VERB --cfg
the whole configuration."""
VERB_HELP = {
    "compare": """\
continual compare [key=value ...]: several strategies over one stream -> a comparison folder.

  continual compare                             five strategies and joint training
  continual compare strategy=naive,[replay,ewc] seed=0,1,2   commas sweep, brackets compose
  continual compare strategy=ewc strategy.ewc.strength=1,100,10000
  continual compare stream=folder stream.path=DIR stream.order=order1,order3 model=scratch
  continual compare hydra/launcher=joblib       spread over processes by a Hydra launcher""",
    "run": """\
continual run [key=value ...]: one strategy over one stream -> a run folder.

  continual run strategy=replay out=runs/replay   give the same command again to resume
  continual run strategy=[replay,ewc] strategy.replay.share=0.5
  continual run model=hf model.name=Qwen/Qwen3-0.6B model.adapter=lora data.template=chat \\
                train.lr=1e-4
  continual run stream=folder stream.path=DIR stream.tasks=[a,b] stream.max_train_rows=500
  continual run score.every_steps=20 'stop_if.forgetting>0.2'   stop if a stage forgets too much
  continual run stream.arrangement=joint          the ceiling: all tasks at once
  continual run probe=[wordings,shots]            also measure robustness and few-shot accuracy""",
    "adapt": """\
continual adapt [key=value ...]: one new task from a checkpoint -> curves and the adapted model.

  continual adapt checkpoint=runs/maml task=NEW   from a run's last checkpoint
  continual adapt checkpoint=runs/maml/checkpoints/stage-03 task=NEW
  continual adapt checkpoint=base task=NEW        from the base model, the reference
  continual adapt checkpoint=runs/maml stream=folder stream.path=DIR task=NEW \\
                  adapt.shots=[16,64] adapt.draws=5""",
    "plan": """\
continual plan [key=value ...]: the cost of a run with these keys, and what grows with its tasks.

  continual plan strategy=ewc                     the default stream and model
  continual plan stream=folder stream.path=DIR model=hf model.name=DIR plan.memory_gb=80
  continual plan model=hf model.name=docs/llama-3.1-8b plan.num_tasks=1000 plan.gpus=64 \\
                 plan.peak_flops=989e12
  continual plan model=hf model.name=DIR plan.num_tasks=20 plan.train_examples=5000 \\
                 plan.tokens_per_example=300 plan.response_tokens=8""",
    "audit": """\
continual audit [key=value ...]: problems in a stream's rows, as run prints them at its start.

  continual audit stream=folder stream.path=DIR score.split=dev   repeats, leaks, conflicts
  continual audit model=hf model.name=Qwen/Qwen3-0.6B   also lengths in tokens; reads no weights""",
    "export": """\
continual export RUN [key=value ...]: a run's model -> a folder with a model card.

  continual export runs/replay                    after the last stage, to runs/replay/export/STAGE
  continual export runs/replay stage=reverse out=models/reverse license=apache-2.0
  continual export runs/lora merged=false         a peft adapter instead of a whole model
  continual export runs/per_task task=reverse     for a strategy with weights for each task""",
    "chat": """\
continual chat RUN [key=value ...]: answer prompts from the terminal or a pipe; see /help.

  continual chat runs/naive                       then /task NAME, /example, /compare
  continual chat runs/naive stage=reverse max_new_tokens=50
  echo 'Reverse the words: red blue' | continual chat runs/naive""",
    "watch": """\
continual watch PATH...: one line for each run in these folders, until all have ended or Ctrl-C.

  continual watch runs/compare                    all runs of a comparison, also pending ones
  continual watch runs/a runs/b every=5           refresh every 5 seconds
  continual watch runs/compare once=true          print once; the default without a terminal""",
    "report": """\
continual report PATH...: tables, report.html and curves.png of run folders.

  continual report runs/compare
  continual report runs/a runs/b runs/c out=runs/abc   a comparison of finished runs
  continual report runs/new-base runs/new-maml out=runs/new   adaptations from different starts""",
    "verify": """\
continual verify PATH...: recompute every summary of matrices in all its published forms.

  continual verify matrix.json other/matrix.json  matrices of your runs, or of others
  continual verify runs/compare                   a run, a comparison, or a folder of files
  continual verify scores.csv json=true           for machines

A CSV has a first line 'stage,TASK,...', then one line per stage, named after the task that was
learned in it (or base), with one score per task: in [0, 1], empty where not measured. With
'stage (percent)' scores are in percent. A line 'counts,N,...' may hold the numbers of test
examples.""",
    "list": """\
continual list [strategies|streams|models|probes]: list what can be chosen, one line each.

  continual list strategies                       also those of installed packages
  continual list strategies json=true             for machines""",
    "completion": """\
continual completion bash|zsh|fish: print a shell completion script.

  eval "$(continual completion bash)"                      in ~/.bashrc
  eval "$(continual completion zsh)"                       in ~/.zshrc, after compinit
  continual completion fish > ~/.config/fish/completions/continual.fish""",
}
