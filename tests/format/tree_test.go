package format

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/tests/debian"
)

// oddTree copies Debian's root, without what apt keeps, and adds /srv/odd.
func oddTree(t *testing.T) string {
	t.Helper()
	root := debian.Root(t)
	dir := filepath.Join(t.TempDir(), "root")
	copying := `mkdir "$2" && tar -C "$1" --xattrs --xattrs-include='*' --numeric-owner --exclude=./var/lib/apt --exclude=./var/cache/apt -cf - . |
		tar -C "$2" --xattrs --xattrs-include='*' --numeric-owner -xpf -`
	if said, err := exec.Command("bash", "-o", "pipefail", "-c", copying, "bash", root, dir).CombinedOutput(); err != nil {
		t.Fatalf("copy %s: %v\n%s", root, err, said)
	}
	odd := filepath.Join(dir, "srv/odd")
	if err := errors.Join(os.MkdirAll(odd, 0o755), addFiles(odd), addXattrs(odd), addSpecial(odd)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// addFiles makes files of sizes about a block, names of all kinds (mkfs.erofs 1.5
// takes none of 255 bytes), a directory of
// many blocks, hard links, holes, and times.
func addFiles(odd string) error {
	write := func(name string, data []byte) error { return os.WriteFile(filepath.Join(odd, name), data, 0o644) }
	data := make([]byte, 3<<20)
	for i := range data {
		data[i] = byte(i>>3) ^ byte(i*i>>11)
	}
	var errs []error
	for _, n := range []int{0, 1, 2, 511, 4095, 4096, 4097, 65535, 65536, 65537, 1<<20 + 1, 3 << 20} {
		errs = append(errs, write(fmt.Sprintf("size-%d", n), data[:n]))
	}
	for i, name := range []string{"\xff\xfe", "a b", "new\nline", `back\slash`, "ü", strings.Repeat("n", 254)} {
		errs = append(errs, write(name, data[:100*i]))
	}
	errs = append(errs, os.Mkdir(filepath.Join(odd, "many"), 0o1777))
	for i := range 2000 {
		errs = append(errs, write(fmt.Sprintf("many/%04d-%s", i*7919%2000, strings.Repeat("x", i%50)), data[i:i+i%7]))
	}
	for i := range 5 {
		errs = append(errs, os.Link(filepath.Join(odd, "size-4097"), filepath.Join(odd, fmt.Sprintf("link-%d", i))))
	}
	errs = append(errs, write("hole", []byte("begin")), os.Truncate(filepath.Join(odd, "hole"), 9<<20))
	for i, at := range []time.Time{time.Unix(-1, 999_999_999), time.Unix(-1<<31, 0), time.Unix(1<<32+7, 123), time.Unix(0, 0), time.Unix(1<<33, 999_999_999)} {
		name := fmt.Sprintf("time-%d", i)
		errs = append(errs, write(name, nil), os.Chtimes(filepath.Join(odd, name), at, at))
	}
	return errors.Join(errs...)
}

// addXattrs makes attributes of all kinds, few and many, small and large, shared
// and not, and ACLs.
func addXattrs(odd string) error {
	var errs []error
	set := func(name, attr string, value []byte) {
		errs = append(errs, unix.Lsetxattr(filepath.Join(odd, name), attr, value, 0))
	}
	acl := func(perm byte) []byte { // version 2: owner, user 70000, group, mask, others
		return []byte{2, 0, 0, 0,
			1, 0, 6, 0, 255, 255, 255, 255, 2, 0, perm, 0, 0x70, 0x11, 1, 0,
			4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 6, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255}
	}
	for i := range 12 {
		name := fmt.Sprintf("attrs-%d", i)
		errs = append(errs, os.WriteFile(filepath.Join(odd, name), []byte(name), 0o644))
		set(name, "user.shared", []byte("the same for all"))
		set(name, "trusted.overlay.opaque", []byte("y"))
		for j := range i {
			set(name, fmt.Sprintf("user.attr-%d", j), []byte(strings.Repeat("v", j*j*3)))
		}
	}
	set("attrs-0", "security.capability", []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	set("attrs-1", "user.empty", nil)
	set("attrs-2", "system.posix_acl_access", acl(6))
	set("many", "system.posix_acl_access", acl(7))
	set("many", "system.posix_acl_default", acl(4))
	return errors.Join(errs...)
}

// addSpecial makes devices, pipes, sockets, links, and owners and modes of all bits.
func addSpecial(odd string) error {
	at := func(name string) string { return filepath.Join(odd, name) }
	errs := []error{
		unix.Mknod(at("char"), unix.S_IFCHR|0o600, int(unix.Mkdev(259, 70000))),
		unix.Mknod(at("block"), unix.S_IFBLK|0o660, int(unix.Mkdev(4095, 1<<20-1))),
		unix.Mknod(at("pipe"), unix.S_IFIFO|0o644, 0), unix.Mknod(at("socket"), unix.S_IFSOCK|0o777, 0),
		os.Symlink(strings.Repeat("long/", 800)+"end", at("long-link")), os.Symlink("nowhere", at("dangling")),
		os.WriteFile(at("ids"), nil, 0o600), os.Chown(at("ids"), 0xfffffffe, 0x80000001),
		os.WriteFile(at("modes"), nil, 0o600), unix.Chmod(at("modes"), 0o7777),
		os.Mkdir(at("empty"), 0o2750), unix.Chmod(at("empty"), 0o2750), os.Lchown(at("dangling"), 65536, 65537),
	}
	return errors.Join(errs...)
}
