# make demo and make test do all the set-up on a bare Debian 12 with Go and
# make, as root or by sudo. Both can be run again at any time.

SHELL = /bin/bash
.SHELLFLAGS = -eu -o pipefail -c
.DELETE_ON_ERROR:

GIT = git -c safe.directory='*'
VERSION ?= $(shell $(GIT) describe --tags --always --dirty 2>/dev/null || echo devel)
GO ?= $(or $(shell command -v go),/usr/local/go/bin/go)
GOLANGCI_LINT_VERSION = v2.15.0
LDFLAGS = -s -w -X github.com/memlinux/memlinux/cli/command.Version=$(VERSION) -X main.version=$(VERSION)
# With sudo, git refuses to look into another user's clone, and go build would
# fail for that.
export GOFLAGS := $(GOFLAGS) -buildvcs=false
# sudo drops the environment; what go and the tests need of it goes along.
SUDO = $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=HTTP_PROXY,HTTPS_PROXY,NO_PROXY,GOPROXY,GOFLAGS,SOURCE_DATE_EPOCH,MEMLINUX_TEST_CACHE)

# What memlinux needs to run.
RUN_PACKAGES = busybox-static dbus-daemon grub-common grub-efi-amd64-bin grub-pc-bin ovmf qemu-system-x86 util-linux xz-utils
# What some of its options need: a kernel or busybox from source, a keymap, a
# time zone. memlinux names them when one is missing.
OPTION_PACKAGES = bc binutils bison bzip2 ccache console-setup dpkg-dev flex gcc kbd libc6-dev libelf-dev m4 make patch perl tzdata xkb-data
# What the tests hold it against.
TEST_PACKAGES = $(OPTION_PACKAGES) $(DEB_PACKAGES) apt btrfs-progs cpio curl dosfstools e2fsprogs fdisk file gdisk git gnupg kmod libcap2-bin libglib2.0-bin lintian \
	mmdebstrap mount mtools ncurses-bin openssl polkitd python3 qemu-utils shellcheck skopeo squashfs-tools strace systemd systemd-container umoci xfsprogs xorriso zstd
# What only the benchmarks hold it against.
BENCH_PACKAGES = bmap-tools dracut-core initramfs-tools-core

# What make deb packs with.
DEB_PACKAGES = build-essential debhelper dpkg-dev

prefix ?= /usr
bindir ?= $(prefix)/bin
libexecdir ?= $(prefix)/libexec
datadir ?= $(prefix)/share
unitdir ?= $(prefix)/lib/systemd/system
tmpfilesdir ?= $(prefix)/lib/tmpfiles.d
sysusersdir ?= $(prefix)/lib/sysusers.d
# Where make deb leaves the package.
debdir ?= build/deb

.PHONY: all build manual demo test bench lint install deb clean

all: build

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cli/memlinux ./cli/memlinux-write ./daemon/memlinuxd

# The manual pages and shell completions, out of the commands' own descriptions
# and docs/.
manual:
	rm -rf build/manual
	$(GO) run -ldflags '-X github.com/memlinux/memlinux/cli/command.Version=$(VERSION)' ./cli/manual build/manual

# The main job: makes an in-memory Linux, writes it into build/stick.img and
# boots that under BIOS and UEFI.
demo: build
	$(call install_packages,$(RUN_PACKAGES))
	mkdir -p build
	rm -f build/stick.img
	$(SUDO) bin/memlinux-write --yes build/stick.img

# All tests: no test may be skipped here for want of root or of a package. The
# kernel that some boot is compiled before, where it is not there yet: beside a
# compiler machines run into their limits. Then those begin that take longest.
test:
	$(call install_packages,$(RUN_PACKAGES) $(TEST_PACKAGES))
	$(SUDO) env PATH="$(dir $(GO)):$$PATH" MEMLINUX_TEST_ALL=1 $(GO) test -count=1 -timeout 80m ./imagegen/kbuild/kbuildtest
	$(SUDO) env PATH="$(dir $(GO)):$$PATH" MEMLINUX_TEST_ALL=1 $(GO) test -count=1 -p 2 -timeout 80m ./cli/memlinux ./bootloader/local ./...

bench: build
	$(call install_packages,$(RUN_PACKAGES) $(TEST_PACKAGES) $(BENCH_PACKAGES))
	$(SUDO) env PATH="$(dir $(GO)):$$PATH" $(GO) run ./daemon/bench

lint:
	test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION) run ./...

install: build manual
	install -D -m 0755 -t $(DESTDIR)$(bindir) bin/memlinux bin/memlinux-write
	install -D -m 0755 -t $(DESTDIR)$(libexecdir) bin/memlinuxd
	install -d $(DESTDIR)$(unitdir) $(DESTDIR)$(datadir)/dbus-1/system-services
	sed 's|@libexecdir@|$(libexecdir)|' systemd/memlinuxd.service > $(DESTDIR)$(unitdir)/memlinuxd.service
	sed 's|@libexecdir@|$(libexecdir)|' systemd/org.memlinux.Memlinux1.service > $(DESTDIR)$(datadir)/dbus-1/system-services/org.memlinux.Memlinux1.service
	install -D -m 0644 -t $(DESTDIR)$(datadir)/dbus-1/system.d systemd/org.memlinux.Memlinux1.conf
	install -D -m 0644 systemd/memlinux.tmpfiles $(DESTDIR)$(tmpfilesdir)/memlinux.conf
	install -D -m 0644 systemd/memlinux.sysusers $(DESTDIR)$(sysusersdir)/memlinux.conf
	install -D -m 0644 -t $(DESTDIR)$(datadir)/polkit-1/actions systemd/org.memlinux.memlinux1.policy
	for n in 1 5 8; do install -D -m 0644 -t $(DESTDIR)$(datadir)/man/man$$n build/manual/man/*.$$n; done
	install -D -m 0644 -t $(DESTDIR)$(datadir)/bash-completion/completions build/manual/bash/*
	install -D -m 0644 -t $(DESTDIR)$(datadir)/zsh/vendor-completions build/manual/zsh/*
	install -D -m 0644 -t $(DESTDIR)$(datadir)/fish/vendor_completions.d build/manual/fish/*

# The Debian package, build/deb/memlinux_*.deb, for this machine's Debian. It is
# made of a copy of the source; the same commit gives the same bytes. A commit
# that has not the changelog's version as its tag is one before that version.
deb:
	$(call install_packages,$(DEB_PACKAGES))
	rm -rf $(debdir)
	mkdir -p $(debdir)/memlinux
	cp -R Makefile LICENSE README.md go.mod go.sum bootloader cli daemon debian docs imagegen media systemd testvm $(debdir)/memlinux
	version=$$(dpkg-parsechangelog -S Version); \
	if commit=$$($(GIT) rev-parse --short HEAD 2>/dev/null) && [ "$$($(GIT) describe --tags --always --dirty)" != "v$$version" ]; then \
		count=$$($(GIT) rev-list --count HEAD); \
		[ -z "$$($(GIT) status --porcelain)" ] || commit=$$commit.dirty; \
		{ printf 'memlinux (%s) unstable; urgency=medium\n\n  * Commit %s.\n\n -- %s  %s\n\n' "$$version~git$$count.$$commit" "$$commit" \
			"$$(dpkg-parsechangelog -S Maintainer)" "$$($(GIT) log -1 --format=%cD)"; cat debian/changelog; } > $(debdir)/memlinux/debian/changelog; \
	fi
	cd $(debdir)/memlinux && env PATH="$(dir $(GO)):$$PATH" GOENV="$$($(GO) env GOENV)" GOMODCACHE="$$($(GO) env GOMODCACHE)" GOCACHE="$$($(GO) env GOCACHE)" GOFLAGS="$$GOFLAGS" \
		dpkg-buildpackage --build=binary --no-sign
	rm -rf $(debdir)/memlinux
	ls -l $(debdir)/*.deb

clean:
	rm -rf bin build

# install_packages installs those of the Debian packages $(1) that are missing,
# and says which.
define install_packages
	@missing=; for p in $(1); do \
		dpkg-query -W -f '$${Status}' "$$p" 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; \
	done; \
	echo "Debian packages needed: $(1)"; \
	if [ -n "$$missing" ]; then \
		echo "Installing:$$missing"; \
		$(SUDO) apt-get update -qq; \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
endef
