# Every command the README names. They need Python 3.11 or newer and make; a C compiler makes the scan fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SCAN := $(wildcard networks/selective_scan/*.c networks/selective_scan/*.h)

.PHONY: demo reproduce-paper reproduce test test-lowest soak lint sanitize bench clean

$(INSTALLED): setup.cfg setup.py pyproject.toml constraints.txt $(SCAN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " \
		+ sys.version.split()[0] + ": make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Each bundle's own configuration with smaller images and fewer epochs, on demo data.
# $(call demo,BUNDLE,DATA SET,PICTURES TO PREDICT,IMAGE SIZE,EPOCHS)
# MONAI warns that configurations execute code; these are our own.
MONAI_RUN := $(BIN)/python -W 'ignore:parsing config_file:UserWarning' -m monai.bundle run
define demo
$(MONAI_RUN) training --config_file bundles/$(1)/configs/train.yaml $(call options,$(2),$(4),$(5))
$(MONAI_RUN) evaluating --config_file "['bundles/$(1)/configs/train.yaml','bundles/$(1)/configs/evaluate.yaml']" \
	$(call options,$(2),$(4),$(5))
$(MONAI_RUN) inferring --config_file bundles/$(1)/configs/inference.yaml --image_size $(4) \
	--ckpt_dir results/demo/$(2) --input data/demo/$(2)/$(3) --output_dir results/demo/$(2)/predictions
endef
options = --dataset_dir data/demo/$(1) --image_size $(2) --max_epochs $(3) --ckpt_dir results/demo/$(1) \
	--log_dir results/demo/$(1)/runs --output_dir results/demo/$(1)

demo: $(INSTALLED)
	$(BIN)/python -m prepare demo --out data/demo --overwrite
	$(call demo,cmunext_busi,busi,images,64,60)
	$(call demo,vmunet_isic,isic17,val/images,64,40)
	$(call demo,vmunet_synapse,synapse,raw/img,64,20)
	@echo "Demo data, not patient data. In results/demo/*: metrics.csv, summary.json, overview.png and predictions/"

# A paper's recipe on raw downloads, and the table beside its row. Without RAW the data are prepared already. SCALE=small
# is for machines without a GPU; SPLITS=DIR holds BUSI's published lists, PRETRAINED=FILE the weights of VMamba.
PAPERS := cmunext vmunet-isic vmunet-isic18 vmunet-synapse
PREPARE_cmunext = busi $(SPLITS:%=--split-files %)
PREPARE_vmunet-isic = isic --year 2017
PREPARE_vmunet-isic18 = isic --year 2018
PREPARE_vmunet-synapse = synapse
PAPER_OPTIONS = experiments/papers/$(PAPER).yaml $(SCALE:%=--scale %) $(PRETRAINED:%=--pretrained %)

reproduce-paper: $(INSTALLED)
	@test -n "$(filter $(PAPER),$(PAPERS))" || { echo "name a paper, and where the download lies unless it is prepared:" \
		"make reproduce-paper PAPER=$$(echo $(PAPERS) | tr ' ' '|') RAW=DIR"; exit 1; }
	$(if $(RAW),$(BIN)/python -m prepare $(PREPARE_$(PAPER)) --raw "$(RAW)")
	$(BIN)/python -m experiments run $(PAPER_OPTIONS)
	$(BIN)/python -m experiments table $(PAPER_OPTIONS)

# make reproduce RUN=DIR repeats the training whose run.json lies there, and compares the weights.
reproduce: $(INSTALLED)
	@test -n "$(RUN)" || { echo "name a run: make reproduce RUN=DIR"; exit 1; }
	$(BIN)/python -m bundles reproduce "$(RUN)"

# All tests, several at once with a thread each, and the share of lines and branches of the packages that they reach.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov --cov-config=setup.cfg

# The tests with the lowest versions that setup.cfg admits, in an environment of their own.
LOWEST := .venv-lowest

test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[test]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# What takes many minutes: fifty kills of a training, and some 3000 broken inputs through every entrance, of which
# `make test` takes a sample.
soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m tests.broken

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SCAN)
	gcc -std=gnu11 -Wall -Wextra -Werror -fopenmp -fsyntax-only $(filter %.c,$(SCAN))

# The kernel's tests with AddressSanitizer and UndefinedBehaviorSanitizer, on a copy that holds nothing but their build.
# libstdc++ is loaded with them, or they cannot follow PyTorch's exceptions; Python never frees all, so leaks do not count.
SANITIZE := build/sanitize
SANITIZERS = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so.6)

sanitize: $(INSTALLED)
	rm -rf $(SANITIZE)
	mkdir -p $(SANITIZE)
	cp -R networks tests setup.cfg $(SANITIZE)
	rm -f $(SANITIZE)/networks/selective_scan/*.so
	gcc -std=gnu11 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -fopenmp \
		-shared -fPIC $(filter %.c,$(SCAN)) -o $(SANITIZE)/networks/selective_scan/scan_cpu.so
	cd $(SANITIZE) && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0:malloc_context_size=1 OMP_NUM_THREADS=2 \
		$(abspath $(BIN))/python -m pytest --capture=sys tests/networks/test_selective_scan.py \
		-k "threads or cpu and (any_shape or definition) and not long and not large"

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

clean:
	rm -rf data/demo results/demo
