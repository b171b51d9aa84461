"""Train a ConvLLaVA, or one of its parts, as a recipe says.

    python -m train RECIPE.yaml [key=value ...]
    torchrun --nproc-per-node 8 -m train RECIPE.yaml [key=value ...]

The same command again goes on from the newest checkpoint in the recipe's `out`. See `train.recipe` for the keys.
"""

import argparse
import os
import resource
import sys
from pathlib import Path

from runtime.command import run
from train.errors import RecipeError
from train.recipe import Recipe, read_recipe


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="YAML file; `train/recipes` has some")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe; dotted where nested")
    args = parser.parse_args(argv)
    # Readers hand over each tensor by a descriptor of its own, and 1,024 are soon used up
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        recipe = read_recipe(args.recipe, args.overrides)
        recipe.accumulation(int(os.environ.get("WORLD_SIZE", "1")))
        run_recipe(recipe)
    except RecipeError as error:
        # All processes of a machine find the same wrong with a recipe, so only the first one prints it
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        return error.exit_code
    return 0


def run_recipe(recipe: Recipe) -> None:
    """Everything after the recipe's own checks. torch is imported here, so that those are quick."""
    from train import distributed, loop, state

    out = Path(recipe.out)
    state.check_same_run(out, recipe)
    world = distributed.join()
    try:
        state.check_same_folder(out, world)
        if state.is_finished(out):
            if world.main:
                print(f"{out / 'final'}: this run has finished")
            return
        loop.seed_everything(recipe.seed)  # the same on every process: new weights are drawn from it
        loop.train(make_task(recipe, world), recipe, world)
    finally:
        distributed.leave()


def make_task(recipe: Recipe, world):
    if recipe.task == "local":
        from train.local import LocalTask

        return LocalTask(recipe, world)
    if recipe.task == "align":
        from train.align import AlignTask

        return AlignTask(recipe, world)
    from train.conversations import ConversationTask

    return ConversationTask(recipe, world)


if __name__ == "__main__":
    try:
        run(main)
    except SystemExit as end:
        if "LOCAL_RANK" not in os.environ:
            raise
        # One of torchrun's processes. Caches of DTensor keep process groups beyond `destroy_process_group`, and gloo's
        # threads, which let go of their last tensor late, would abort an interpreter that is shutting down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)
