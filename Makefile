# The commands of this repository. `make` alone lists them.
# GOFLAGS and the rest of Go's environment are yours: nothing here changes them.

GO            ?= go
GOLANGCI      := v2.15.0
LINTER        := .cache/bin/golangci-lint-$(GOLANGCI)
FUZZTIME      ?= 10s
GENERATE      := $(GO) tool -modfile=tools/go.mod oapi-codegen

# The race detector needs a C compiler, which a fresh machine may not have.
RACE           = $(if $(filter 1,$(shell $(GO) env CGO_ENABLED)),-race)
# Packages with tests that boot machines here: those with a file NAME_vm_test.go.
# Those of Firecracker need KVM, and run in test-kvm.
VM_PACKAGES    = $(filter-out ./internal/kvmtest/ ./internal/vmm/firecracker/,$(sort $(dir $(shell find ./internal ./client ./cmd -name '*_vm_test.go'))))

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install the distribution's packages that Tine needs, if some are missing
	@scripts/setup.sh

.PHONY: setup-tests
setup-tests: ## the same, and what only the tests need
	@scripts/setup.sh tests

# No revision is stamped into the agent: its bytes are part of every image, and
# an image must not change with each commit.
.PHONY: build
build: ## build bin/tine and bin/tine-agent, both static
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/tine ./cmd/tine
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o bin/tine-agent ./cmd/tine-agent

.PHONY: demo
demo: setup build ## fork ten virtual machines and run Python in each
	bin/tine demo

.PHONY: bench
bench: setup build ## measure boots, forks and round trips
	bin/tine bench

.PHONY: test
test: test-unit test-vm test-kvm-short ## run all tests, of those in test-kvm the most telling

.PHONY: test-unit
test-unit: ## run the tests that boot nothing; they need no root and no network
	$(GO) test $(RACE) ./...

# Two packages at a time: machines that are emulated wait as much as they work.
.PHONY: test-vm
test-vm: setup-tests build ## run the tests that boot virtual machines
	$(GO) test -tags vm -count 1 -p 2 -timeout 15m $(VM_PACKAGES)

# FIRECRACKER and JAILER are paths of the programs, where there are any.
KVM_TEST = $(GO) test -tags vm -count 1 -v -timeout 30m ./internal/kvmtest

.PHONY: test-kvm
test-kvm: setup-tests build ## run the tests of engines that need KVM, in an emulated machine that has it
	$(KVM_TEST)

.PHONY: test-kvm-short
test-kvm-short: setup-tests build
	$(KVM_TEST) -short

.PHONY: fuzz
fuzz: ## run each fuzz test for FUZZTIME (10s)
	@set -e; $(GO) test -list '^Fuzz' ./... \
	| awk '/^Fuzz/ {name[n++] = $$1} /^ok/ {for (i = 0; i < n; i++) print $$2, name[i]; n = 0}' \
	| while read -r package name; do \
		$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x "$$package"; \
	done

.PHONY: lint
lint: $(LINTER) ## check the code's style
	$(LINTER) run --build-tags vm ./...

.PHONY: fmt
fmt: $(LINTER) ## format the code
	$(LINTER) fmt ./...

$(LINTER):
	@echo 'lint: building golangci-lint $(GOLANGCI), once; it takes two minutes'
	GOBIN=$(CURDIR)/.cache/bin $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI)
	mv .cache/bin/golangci-lint $@

.PHONY: gen
gen: ## write internal/wire anew from api/openapi.yaml
	$(GENERATE) -config internal/wire/gen.yaml api/openapi.yaml

.PHONY: check-gen
check-gen: ## see that internal/wire is what gen would write
	@mkdir -p .cache
	@sed 's|^output:.*|output: .cache/wire.gen.go|' internal/wire/gen.yaml >.cache/wire.yaml
	$(GENERATE) -config .cache/wire.yaml api/openapi.yaml
	diff -u internal/wire/wire.gen.go .cache/wire.gen.go

.PHONY: clean
clean: ## remove what make has built, the tests' images included
	rm -rf bin .cache
