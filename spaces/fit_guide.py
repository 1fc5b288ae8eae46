"""Train the classifier of clean pictures that guides the Space's PPAP."""

import argparse

import numpy as np

from diffusers_dmp.evaluation.digits import fit_resnet
from diffusers_dmp.evaluation.fashion import CLASSES
from diffusers_dmp.evaluation.images import open_images
from diffusers_dmp.terminal import OneLineParser, run_command
from diffusers_dmp.training.data.images import load_images

SEED = 1  # of another network than those that measure


def main(argv: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder of pictures with labels")
    parser.add_argument("--output_dir", required=True, help="where the classifier is saved")
    parser.add_argument("--max_train_steps", type=int, default=1500, help="optimizer steps")
    args = parser.parse_args(argv)
    images = np.concatenate([batch[..., :1] for batch in open_images(args.dataset).batches(1000)])  # grey
    labels = np.asarray(load_images(args.dataset)["label"][:])
    fit_resnet(args.output_dir, images, labels, list(CLASSES), args.max_train_steps, seed=SEED)


if __name__ == "__main__":
    run_command(main)
