# `make demo` and `make test` are all a newcomer needs; both set up .venv when it is missing.
PYTHON ?= python3
CPU_THREADS ?= $(shell nproc)
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
DEMO = outputs/demo
FASHION = outputs/dtr_fashion
TEXT = outputs/demo_text
GUIDED = outputs/demo_guidance
PRESET ?= cpu
SITE_PACKAGES = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
DIFFUSERS_VERSIONS ?= 0.40.0 0.41.0 0.42.1
DIFFUSERS_TESTS ?= tests/hub/test_loading.py tests/hub/test_registration.py tests/saving tests/pipelines tests/models tests/plugins tests/guidance
TRAIN = $(BIN)/accelerate launch --quiet --num_machines 1 --num_processes 1 --dynamo_backend no --mixed_precision no \
  --num_cpu_threads_per_process $(CPU_THREADS)
# The tests of numbers, which start no processes; what is missing of these folders is left out.
NUMERIC_TESTS = $(wildcard tests/test_intervals.py tests/diffusion tests/models tests/plugins tests/guidance tests/pipelines \
  tests/conversion tests/training/objectives tests/evaluation)
# a third of the modules is ever imported: those are compiled when they first are, and the rest never (--no-compile)
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-fashion demo-remix demo-dmp demo-patch demo-ppap demo-text demo-guidance compare space space-models test test-slow test-browser lint format docs hooks clean test-diffusers test-portable test-gpu

demo: .venv/demo.installed
	$(BIN)/python examples/digits_demo.py data
	rm -rf $(DEMO)/checkpoint-*
	$(TRAIN) training/train_dtr.py --config training/presets/dtr_digits.yaml --output_dir $(DEMO)
	$(BIN)/python examples/digits_demo.py report $(DEMO)
	@echo "Next, the same with 60,000 pictures of clothes, 28 x 28 pixels, in some minutes more: make demo-fashion"

demo-fashion: .venv/demo.installed
	$(BIN)/python examples/fashion_demo.py data
	rm -rf $(FASHION)/checkpoint-*
	$(TRAIN) training/train_dtr.py --config training/presets/dtr_fashion.yaml --output_dir $(FASHION)
	$(BIN)/python examples/fashion_demo.py report $(FASHION)

demo-remix: .venv/demo.installed
	$(BIN)/python examples/digits_demo.py data
	rm -rf outputs/dit_digits/checkpoint-* outputs/remix_digits/checkpoint-*
	$(TRAIN) training/train_dit.py --config training/presets/dit_digits.yaml
	$(TRAIN) training/train_remix.py --config training/presets/remix_digits.yaml
	$(BIN)/python examples/digits_demo.py report outputs/dit_digits
	$(BIN)/python examples/digits_demo.py report outputs/remix_digits

demo-dmp: .venv/demo.installed
	$(BIN)/python examples/digits_demo.py data
	rm -rf outputs/dit_digits_train/checkpoint-* outputs/dmp_digits/checkpoint-*
	$(TRAIN) training/train_dit.py --config training/presets/dit_digits.yaml \
	  --dataset outputs/demo/digits_train --output_dir outputs/dit_digits_train
	$(TRAIN) training/train_dmp.py --config training/presets/dmp_digits.yaml
	$(BIN)/python examples/digits_demo.py report outputs/dit_digits_train
	$(BIN)/python examples/digits_demo.py report outputs/dmp_digits

demo-patch: .venv/demo.installed
	$(BIN)/python examples/digits_demo.py data
	rm -rf outputs/patch_digits/expert_*/checkpoint-*
	$(TRAIN) training/train_patch_diffusion.py --config training/presets/patch_digits.yaml
	$(BIN)/python examples/digits_demo.py report outputs/patch_digits

demo-ppap: .venv/demo.installed
	$(BIN)/python examples/digits_demo.py data
	rm -rf outputs/dit_digits_unconditional/checkpoint-* outputs/ppap_digits/expert_*
	$(TRAIN) training/train_dit.py --config training/presets/dit_digits_unconditional.yaml
	$(BIN)/python examples/digits_demo.py classifier outputs/digits_classifier
	$(TRAIN) training/generate_guidance_data.py --pipeline outputs/dit_digits_unconditional/pipeline \
	  --num_images 3000 --batch_size 500 --output_dir outputs/ppap_digits_data
	$(TRAIN) training/train_ppap.py --config training/presets/ppap_digits.yaml
	$(BIN)/python examples/digits_demo.py guidance outputs/ppap_digits

# After an interruption, `make demo-text` goes on where it stopped: each part leaves a file that the next one needs.
TEXT_DATA = clothes_train clothes_validation digits_train digits_validation
TEXT_LORAS = lora lora_experts_2 lora_experts_4

demo-text: $(TEXT)/digits.json
	@echo "$$(date +%T) Done. Look at clothes.png, digits.png and digits.md in $(TEXT)."

$(TEXT)/start.done: | .venv/demo-text.installed
	@echo "$$(date +%T) Part 1 of 6: pictures, captions and a new pipeline. Next: encoding them."
	$(BIN)/python examples/text_demo.py data $(TEXT)
	touch $@

$(TEXT_DATA:%=$(TEXT)/encoded/%.done): $(TEXT)/encoded/%.done: $(TEXT)/start.done
	@echo "$$(date +%T) Part 2 of 6: encoding $*. Next: training from random weights."
	$(TRAIN) training/encode_prompts.py --pipeline $(TEXT)/start --dataset $(TEXT)/$* --output_dir $(TEXT)/encoded/$* \
	  --resolution 28 --batch_size 64 --shard_size 4096
	touch $@

$(TEXT)/base.done: $(TEXT_DATA:%=$(TEXT)/encoded/%.done)
	@echo "$$(date +%T) Part 3 of 6: training on clothes, the longest part. Next: drawing from prompts."
	$(TRAIN) training/train_text_to_image.py --config training/presets/text_clothes.yaml
	touch $@

$(TEXT)/clothes.json: $(TEXT)/base.done
	@echo "$$(date +%T) Part 4 of 6: drawing clothes from prompts. Next: adapting the model to digits."
	$(BIN)/python examples/text_demo.py clothes $(TEXT)

$(TEXT_LORAS:%=$(TEXT)/%.done): $(TEXT)/%.done: $(TEXT)/clothes.json
	@echo "$$(date +%T) Part 5 of 6: $*. Next: comparing one LoRA with LoRA experts."
	$(TRAIN) training/train_text_to_image.py --config training/presets/text_digits_$*.yaml
	touch $@

$(TEXT)/digits.json: $(TEXT_LORAS:%=$(TEXT)/%.done)
	@echo "$$(date +%T) Part 6 of 6: drawing digits, and the loss by noise level."
	$(BIN)/python examples/text_demo.py digits $(TEXT)

# Needs the model of clothes, which `make demo-text` trains; goes on where it stopped, too.
demo-guidance: $(GUIDED)/guidance.json
	@echo "$$(date +%T) Done. Look at guidance_fashion.png and guidance.md in $(GUIDED)."

$(GUIDED)/classifiers.json: | .venv/demo-text.installed
	@echo "$$(date +%T) Part 1 of 5: a classifier that guides, and one that judges. Next: pictures for the experts."
	$(BIN)/python examples/guidance_demo.py classifiers $(GUIDED)

$(GUIDED)/images.done: $(TEXT)/base.done
	@echo "$$(date +%T) Part 2 of 5: the model draws 3,000 pictures without a prompt. Next: training experts."
	$(TRAIN) training/generate_guidance_data.py --pipeline $(TEXT)/base/pipeline --scheduler "" \
	  --pipeline_arguments '{"prompt": "", "guidance_scale": 1.0}' --num_images 3000 --output_dir $(GUIDED)/images
	touch $@

$(GUIDED)/flow.done $(GUIDED)/ddpm.done: $(GUIDED)/%.done: $(GUIDED)/classifiers.json $(GUIDED)/images.done
	@echo "$$(date +%T) Part 3 of 5: experts on the noise of $*. Next: guiding."
	$(TRAIN) training/train_ppap.py --config training/presets/ppap_fashion.yaml --objective $* --output_dir $(GUIDED)/$*
	touch $@

$(GUIDED)/scales.json: $(GUIDED)/flow.done $(GUIDED)/ddpm.done
	@echo "$$(date +%T) Part 4 of 5: a few pictures with each scale. Next: comparing."
	$(BIN)/python examples/guidance_demo.py search $(GUIDED)

$(GUIDED)/guidance.json: $(GUIDED)/scales.json
	@echo "$$(date +%T) Part 5 of 5: comparing what guides, with several schedulers."
	$(BIN)/python examples/guidance_demo.py compare $(GUIDED)

compare: .venv/compare.installed
	$(BIN)/python -m benchmarks.comparison --preset $(PRESET) $(if $(MINUTES),--minutes $(MINUTES))

space: .venv/space.installed
	$(BIN)/python spaces/app.py

space-models: .venv/space.installed
	CPU_THREADS=$(CPU_THREADS) $(BIN)/python spaces/make_models.py

test: .venv/test.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-slow: .venv/test.installed
	$(BIN)/python -m pytest -q -m slow

test-browser: .venv/test.installed
	$(BIN)/python -m pytest -q -m slow tests/spaces/test_space_browser.py

test-diffusers: $(DIFFUSERS_VERSIONS:%=.venvs/diffusers-%)
	for version in $(DIFFUSERS_VERSIONS); do \
	  .venvs/diffusers-$$version/bin/python -c "import diffusers; assert diffusers.__version__ == '$$version'; print('diffusers', '$$version')" \
	  && .venvs/diffusers-$$version/bin/python -m pytest -q $(DIFFUSERS_TESTS) || exit 1; \
	done

# an environment of its own with that version of Diffusers, in front of everything that .venv has
.venvs/diffusers-%: .venv/test.installed
	rm -rf $@ $@.unfinished
	$(BIN)/python -m venv --without-pip $@.unfinished
	target=$$($@.unfinished/bin/python $(SITE_PACKAGES)) && $(BIN)/python -m pip install --quiet --no-deps --no-compile \
	  --disable-pip-version-check --target $$target diffusers==$* \
	  && echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" > $$target/all_of_venv.pth
	mv $@.unfinished $@

# on other CPUs: instructions of the oldest and of a usual one, one thread and two (which wait for each other without spinning)
test-portable: .venv/test.installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(NUMERIC_TESTS)
	ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q $(NUMERIC_TESTS)

test-gpu: .venv/test.installed
	DMP_TEST_GPU=1 $(BIN)/python -m pytest -q -m gpu tests/gpu

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open outputs/site/index.html"

hooks: .venv/test.installed
	$(BIN)/pre-commit install

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Expected Python 3.11 or newer, but got " + sys.version)'
	$(PYTHON) -m venv .venv

.venv/%.installed: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) -e ".[$*]"
	touch $@

clean:
	rm -rf .venv .venvs outputs
