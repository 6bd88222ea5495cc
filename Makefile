# Every command the README names. They need Python 3.10 or newer and make; a C compiler makes the scan fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SCAN := $(wildcard networks/selective_scan/*.c networks/selective_scan/*.h)

.PHONY: demo test lint bench clean

$(INSTALLED): setup.cfg setup.py pyproject.toml constraints.txt $(SCAN)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# VM-UNet on abdominal phantoms: the bundle's own configuration with smaller images and fewer epochs.
CT := bundles/vmunet_synapse/configs
CT_DATA := data/demo/synapse
CT_RESULT := results/demo/synapse
CT_OPTIONS := --dataset_dir $(CT_DATA) --image_size 64 --max_epochs 20 \
	--ckpt_dir $(CT_RESULT) --log_dir $(CT_RESULT)/runs --output_dir $(CT_RESULT)

demo: $(INSTALLED)
	$(BIN)/python -m prepare demo --out data/demo --overwrite
	$(BIN)/python -m monai.bundle run training --config_file $(CT)/train.yaml $(CT_OPTIONS)
	$(BIN)/python -m monai.bundle run evaluating \
		--config_file "['$(CT)/train.yaml','$(CT)/evaluate.yaml']" $(CT_OPTIONS)
	$(BIN)/python -m monai.bundle run inferring --config_file $(CT)/inference.yaml --image_size 64 \
		--ckpt_dir $(CT_RESULT) --input $(CT_DATA)/raw/img --output_dir $(CT_RESULT)/predictions
	@echo "Phantoms, not patient data. Table: $(CT_RESULT)/metrics.csv; picture: $(CT_RESULT)/overview.png;" \
		"masks: $(CT_RESULT)/predictions"

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf data/demo results/demo
