# Targets for people; .ci/run is what continuous integration runs.

GO          ?= go
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: all build demo test race lint bench fuzz guest clean
all: build

# One static binary, bin/erofs-oci.
build:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/erofs-oci .

# The main job on an embedded default: a registry in this process, a real image,
# a real mount. It cleans up after itself.
demo: build
	$(GO) run ./tests/demo -binary bin/erofs-oci

# Every test. What the machine cannot do is skipped and said; name capabilities
# in EROFS_OCI_REQUIRE (or "all") to have them fail instead.
test:
	@skips=$$(mktemp) ; EROFS_OCI_SKIPS=$$skips $(GO) test ./... ; code=$$? ; \
	if [ -s $$skips ] ; then echo 'tests skipped, for want of:' ; sort $$skips | uniq -c ; fi ; \
	rm -f $$skips ; exit $$code

race:
	$(GO) test -race -short ./...

# Mounts over NBD under real kernels, Debian's 6.12 and 6.1 with nbd.ko, in an
# emulator: as root, for it makes images of a Debian. It fetches packages once and
# takes minutes; a third guest runs while two wait for the kernel's timeouts.
guest:
	EROFS_OCI_REQUIRE=nbd-guest,debian,mkfs.erofs $(GO) test -count=1 -timeout 20m -parallel 3 ./tests/guest

lint:
	@test -z "$$(gofmt -l .)" || { gofmt -l . ; echo 'gofmt -w the files above' ; exit 1 ; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

# Ratios against the kernel's erofs and erofsfuse, as root: see tests/bench.
bench: build
	$(GO) run ./tests/bench -binary bin/erofs-oci

# Each fuzz target for so many inputs: a time limit now and then ends go test -fuzz
# with an error of its own.
FUZZTIME ?= 50000x
fuzz:
	@for p in $$($(GO) list ./...) ; do \
		list=$$($(GO) test -list '^Fuzz' $$p) || { echo "$$list" ; exit 1 ; } ; \
		for f in $$(echo "$$list" | grep '^Fuzz') ; do \
			echo "$$f of $$p" ; \
			$(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$p || exit 1 ; \
		done ; \
	done

clean:
	rm -rf bin
