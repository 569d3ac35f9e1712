package require

import (
	"os"
	"testing"
)

// failing records what Has does to a test, without doing it to this one.
type failing struct {
	testing.TB
	outcome string
}

func (f *failing) Helper() {}
func (f *failing) Fatalf(string, ...any) {
	f.outcome = "failed"
	panic(f)
}
func (f *failing) Skipf(string, ...any) {
	f.outcome = "skipped"
	panic(f)
}

func outcome(t *testing.T, capability string) string {
	t.Helper()
	f := &failing{TB: t, outcome: "ran"}
	func() {
		defer func() {
			if r := recover(); r != nil && r != any(f) {
				panic(r)
			}
		}()
		Has(f, capability)
	}()
	return f.outcome
}

func TestMissingCapability(t *testing.T) {
	t.Setenv("EROFS_OCI_SKIPS", "") // what is skipped here is no test
	t.Setenv("PATH", t.TempDir())
	for demanded, want := range map[string]string{
		"":                  "skipped",
		"mkfs.erofs":        "failed",
		"root, mkfs.erofs":  "failed",
		"all":               "failed",
		"docker-registry":   "skipped",
		"mkfs.erofs.static": "skipped",
	} {
		t.Setenv("EROFS_OCI_REQUIRE", demanded)
		if got := outcome(t, "mkfs.erofs"); got != want {
			t.Errorf("EROFS_OCI_REQUIRE=%q: the test %s, want %s", demanded, got, want)
		}
	}
	noted := t.TempDir() + "/skips"
	if err := os.WriteFile(noted, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("EROFS_OCI_REQUIRE", "")
	t.Setenv("EROFS_OCI_SKIPS", noted)
	outcome(t, "mkfs.erofs")
	if b, err := os.ReadFile(noted); err != nil || string(b) != "mkfs.erofs\n" {
		t.Errorf("noted %q, %v", b, err)
	}
	if got := outcome(t, "no such thing"); got != "failed" {
		t.Errorf("an unknown capability: the test %s", got)
	}
}

func TestPresentCapability(t *testing.T) {
	t.Setenv("EROFS_OCI_SKIPS", "") // what is skipped here is no test
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/mkfs.erofs", []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if got := outcome(t, "mkfs.erofs"); got != "ran" {
		t.Errorf("the test %s", got)
	}
}

// Kernels are booted for those only who ask for it.
func TestGuestMustBeAskedFor(t *testing.T) {
	t.Setenv("EROFS_OCI_SKIPS", "") // what is skipped here is no test
	dir := t.TempDir()
	for _, name := range []string{"qemu-system-x86_64", "apt-get", "dpkg-deb"} {
		if err := os.WriteFile(dir+"/"+name, []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ path, demanded, want string }{
		{dir, "", "skipped"}, {dir, "root", "skipped"}, {dir, "nbd-guest", "ran"}, {dir, "all", "ran"},
		{t.TempDir(), "nbd-guest", "failed"},
	} {
		t.Setenv("PATH", c.path)
		t.Setenv("EROFS_OCI_REQUIRE", c.demanded)
		if got := outcome(t, "nbd-guest"); got != c.want {
			t.Errorf("EROFS_OCI_REQUIRE=%q: the test %s, want %s", c.demanded, got, c.want)
		}
	}
}
