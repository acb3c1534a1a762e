"""The commands that look after runs: submit, status, replay, export, and the group `checkpoint`."""

from pathlib import Path

from megavlm.cli.arguments import NotNegative, Positive


class CheckpointCommands:
    """List, verify and prune the checkpoints of a run."""

    def list(self, run: str):
        """List the complete checkpoints, oldest first: step, size, ranks that wrote it, age, metrics.

        Args:
            run: The run folder.
        """
        from megavlm.runs.checkpoints import table

        print(table(Path(str(run))))

    def verify(self, path: str):
        """Compare the files of one or all checkpoints with the manifest.

        Ends with status 1 if anything is damaged.

        Args:
            path: A run folder or one checkpoint.
        """
        from megavlm.runs.checkpoints import verify_all

        lines, sound = verify_all(Path(str(path)))
        print("\n".join(lines))
        if not sound:
            raise SystemExit(1)

    def prune(
        self,
        run: str,
        keep_last: int | None = None,
        keep_every_steps: int | None = None,
        keep_best: int | None = None,
        dry_run: bool = False,
    ):
        """Remove checkpoints by the run's own rule, or by a stricter one.

        Args:
            run: The run folder. The run may be in progress.
            keep_last: How many of the newest stay; by default the recipe's number.
            keep_every_steps: Checkpoints at multiples of this step stay; by default the recipe's number.
            keep_best: How many of the best stay, by the recipe's metric; by default the recipe's number.
            dry_run: Only say what would be removed.
        """
        from megavlm.parts.trained import load_run_config
        from megavlm.runs.checkpoints import prune
        from megavlm.runs.folder import RunFolder

        given = {"keep_last": keep_last, "keep_every_steps": keep_every_steps, "keep_best": keep_best}
        changes = {name: value for name, value in given.items() if value is not None}
        rule = load_run_config(RunFolder(str(run))).checkpoint.model_copy(update=changes)
        removed = prune(Path(str(run)), rule, bool(dry_run))
        word = "would be removed" if dry_run else "removed"
        print("\n".join(f"{path} {word}" for path in removed) or "nothing to remove")


class RunCommands:
    """A part of the commands of `megavlm`, which inherit from it."""

    def status(self, run: str):
        """Say where a run stands: state, step, pace, time left, last checkpoint, restarts, queue.

        Args:
            run: The run folder.
        """
        from megavlm.runs.status import describe_status

        print(describe_status(str(run)))

    def replay(self, run: str, step: int | None = None):
        """Run the packs of a skipped step again: what does each of them do?

        The report is JSON.

        Args:
            run: The run folder; or one checkpoint in it, for the weights.
            step: The number of the skipped step; by default the last one.
        """
        import json

        from megavlm.training.forensics import replay

        print(json.dumps(replay(str(run), step), indent=2))

    def export(self, source: str, out: str, dtype: str = "float32"):
        """Write a checkpoint as a folder that `transformers` loads.

        Weights as safetensors, with the image tokenizer.

        `ask`, `generate`, `batch`, `serve`, `evaluate` and `judge` take the folder in place of a run.

        Args:
            source: A run folder (its newest checkpoint) or one checkpoint.
            out: The folder to write; it must not exist.
            dtype: Type of the weights: float32 or bfloat16.
        """
        from megavlm.parts.export import export

        print(f"{out}: {export(Path(str(source)), Path(str(out)), dtype)}")

    def study(
        self, study: str, parallel: Positive = 1, processes: Positive = 1, array: str | None = None, report_only: bool = False, **overrides
    ):
        """Train and judge every arm of a study, and write its report: does joint training gain, and what does each policy keep of it?

            megavlm study digits --parallel 2

        Arms that are done are not repeated. The report is STUDY_DIR/report.md, with report.png and report.json.

        Args:
            study: Path of a YAML file (see megavlm/recipes/studies/digits.yaml), or a name such as `digits`.
            parallel: Arms that run at the same time on this machine; they share its cores.
            processes: Training processes per arm.
            array: Train nothing. Write the arms that are not trained yet to this file, and print the `megavlm submit --array` for it.
            report_only: Train nothing. Judge the trained arms and report the complete seeds.
            overrides: Settings of the study to change: --seeds=[0,1] --study_dir=runs/mine
        """
        from megavlm.study.report import write_report
        from megavlm.study.results import collect
        from megavlm.study.runner import is_trained, run_arms
        from megavlm.study.spec import load_study, plan_arms, write_array

        plan = load_study(str(study), overrides)
        arms = plan_arms(plan)
        if array:
            todo = [arm for arm in arms if not is_trained(arm)]
            write_array(todo, Path(array))
            print(f"{array}: {len(todo)} of {len(arms)} arms are not trained. Train them on SLURM, then give the study again:")
            print(f"  megavlm submit {plan.recipe} --array={array} --run_dir={plan.study_dir}/runs --nodes=1 --gpus-per-node=1")
            return
        run_arms([arm for arm in arms if not report_only or is_trained(arm)], parallel, processes)
        print(write_report(collect(plan, arms), " ".join(["megavlm study", str(study), *(f"--{k}={v}" for k, v in overrides.items())])))

    def submit(
        self,
        recipe: str,
        nodes: Positive = 1,
        gpus_per_node: NotNegative = 8,
        partition: str | None = None,
        time: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        cpus_per_task: Positive = 8,
        container_image: str | None = None,
        modules: str | None = None,
        setup: str | None = None,
        cache: str | None = None,
        max_restarts: NotNegative = 100,
        warning_s: NotNegative = 120,
        array: str | None = None,
        template: str | None = None,
        sbatch_options: str = "",
        srun_options: str = "--cpu-bind=cores --distribution=block:block",
        node_check: bool = True,
        dry_run: bool = False,
        **overrides,
    ):
        """Write an sbatch script for a recipe and submit it.

            megavlm submit digits --nodes=2 --gpus-per-node=2 --time=24:00:00

        The script lies in the run folder. There is one process per GPU; the processes have to share data.num_lanes evenly. The job
        requeues itself after the time limit, a preemption, a lost node or process, until the run is done. After an error it does not.

        Args:
            recipe: Path of a YAML file, or a name such as `digits`.
            nodes: Number of nodes.
            gpus_per_node: One process on each; 0: one per node, on CPU.
            partition: SLURM partition.
            time: "24:00:00" or "2-00:00:00"; a number is minutes.
            account: SLURM account.
            qos: SLURM quality of service.
            cpus_per_task: CPU cores per process.
            container_image: For pyxis, or a .sif file for Apptainer.
            modules: Environment modules to load, with commas.
            setup: A line of shell first: "source .venv/bin/activate".
            cache: Node-local folder for copies of remote shards.
            max_restarts: How often the job is requeued at most.
            warning_s: SIGUSR1 so long before the time limit; 0: never.
            array: YAML list of mappings of settings, a run for each.
            template: An sbatch template of your own.
            sbatch_options: Such as "--constraint=h100 --exclusive".
            srun_options: Instead of the binding to cores, in blocks.
            node_check: First leave out nodes that are not well.
            dry_run: Write and show the script; submit nothing.
            overrides: Settings of the recipe to change.
        """
        from megavlm.launch.job import Job
        from megavlm.launch.submit import submit

        job = Job(
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            partition=partition,
            time=None if time is None else str(time),
            account=account,
            qos=qos,
            cpus_per_task=cpus_per_task,
            container_image=container_image,
            modules=modules,
            setup=setup,
            cache=cache,
            max_restarts=max_restarts,
            warning_s=warning_s,
            template=template,
            sbatch_options=sbatch_options,
            srun_options=srun_options,
            node_check=bool(node_check),
        )
        print(submit(str(recipe), overrides, job, array, dry_run=bool(dry_run)))
