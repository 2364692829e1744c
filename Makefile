# One verb each; the work is done in scripts/, which continuous integration runs too.
# Options go through ARGS: `make demo ARGS="--quick"`, `make bench ARGS="lookup --quick"`.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench soak

help: ## list the verbs
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

setup: ## make .venv, install ekko into it, compile the kernels once
	@scripts/setup

demo: ## the whole system on this machine, on real data
	@scripts/demo $(ARGS)

test: ## everything that continuous integration runs: lint, types, contracts, tests
	@scripts/test $(ARGS)

check: ## lint, types and import contracts
	@scripts/check

bench: ## one benchmark: make bench ARGS="NAME [--json OUT] [--quick]"
	@scripts/bench $(ARGS)

soak: ## a thousand seeds of faults in virtual time: make soak ARGS="0:1000"
	@scripts/soak $(ARGS)
