package fusefs_test

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/fusefs"
	"github.com/erofs-oci/erofs-oci/tests/require"
)

// An ace is an entry of a POSIX ACL (include/uapi/linux/posix_acl.h).
type ace struct {
	tag, perm uint16
	id        uint32
}

const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
	noID        = ^uint32(0)
)

// aclXattr is an ACL as getxattr(2) has it (include/uapi/linux/posix_acl_xattr.h).
func aclXattr(entries ...ace) map[string][]byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return map[string][]byte{"system.posix_acl_access": b}
}

// An asker is a user with groups.
type asker struct {
	name     string
	uid, gid uint32
	groups   []uint32
}

// TestACL: who may do what under ACLs is what the mode bits alone do not say, and
// the same as on the kernel's erofs.
func TestACL(t *testing.T) {
	require.Has(t, "root", "fuse", "kernel-erofs", "loop")
	const owner, alice, bob, staff = 1001, 1002, 1003, 2001
	acl := aclXattr(ace{aclUserObj, 6, noID}, ace{aclUser, 4, alice}, ace{aclGroupObj, 0, noID},
		ace{aclGroup, 6, staff}, ace{aclMask, 6, noID}, ace{aclOther, 0, noID})
	masked := aclXattr(ace{aclUserObj, 7, noID}, ace{aclUser, 7, alice}, ace{aclGroupObj, 7, noID},
		ace{aclMask, 4, noID}, ace{aclOther, 1, noID})
	dir := aclXattr(ace{aclUserObj, 7, noID}, ace{aclUser, 5, bob}, ace{aclGroupObj, 0, noID},
		ace{aclMask, 5, noID}, ace{aclOther, 0, noID})
	var entries []mkerofs.Entry
	for _, e := range []mkerofs.Entry{
		// With an ACL the group bits are its mask.
		{Path: "acl", Mode: mkerofs.ModeRegular | 0o660, Xattrs: acl},
		{Path: "masked", Mode: mkerofs.ModeRegular | 0o741, Xattrs: masked},
		{Path: "mode", Mode: mkerofs.ModeRegular | 0o660},
		{Path: "dir", Mode: mkerofs.ModeDir | 0o750, Xattrs: dir},
		{Path: "dir/inside", Mode: mkerofs.ModeRegular | 0o644},
	} {
		e.UID, e.GID, e.Mtime = owner, owner, time.Unix(1, 0)
		entries = append(entries, e)
	}
	image := buildImage(t, entries)
	kernels, ours := openDir(t), openDir(t)
	if said, err := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", image, kernels).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, said)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(kernels, 0); err != nil {
			t.Error(err)
		}
	})
	mountForAll(t, image, ours)
	for _, w := range []struct {
		asker
		want string // of reading and executing each path, as the ACLs say
	}{
		{asker{"the owner", owner, owner, nil}, "r- rx r- rx r-"},
		{asker{"alice", alice, alice, nil}, "r- r- -- -- --"},
		{asker{"bob", bob, bob, nil}, "-- -x -- rx r-"},
		{asker{"bob of staff", bob, bob, []uint32{staff}}, "r- -x -- rx r-"},
		{asker{"one of the owner's group", 1004, owner, nil}, "-- r- r- -- --"},
	} {
		fromKernel, got := access(t, w.asker, kernels, entries), access(t, w.asker, ours, entries)
		if got != fromKernel {
			t.Errorf("%s: %s, the kernel's mount says %s", w.name, got, fromKernel)
		}
		if got != w.want {
			t.Errorf("%s: %s, want %s", w.name, got, w.want)
		}
	}
	for _, name := range []string{"acl", "masked", "dir", "mode"} {
		var want, got [256]byte
		n, err := unix.Lgetxattr(filepath.Join(kernels, name), "system.posix_acl_access", want[:])
		m, ourErr := unix.Lgetxattr(filepath.Join(ours, name), "system.posix_acl_access", got[:])
		if n != m || want != got || !errors.Is(ourErr, err) {
			t.Errorf("%s: an ACL of %d bytes, %v; the kernel's has %d, %v", name, m, ourErr, n, err)
		}
	}
}

func buildImage(t *testing.T, entries []mkerofs.Entry) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := mkerofs.New(f, mkerofs.Options{})
	for _, e := range entries {
		if err == nil {
			err = b.Add(e)
		}
	}
	if err == nil {
		_, err = b.Finish(t.Context())
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// openDir is a temporary directory that everybody can come to.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "acl-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// mountForAll serves an image to all users, from this process.
func mountForAll(t *testing.T, image, dir string) {
	t.Helper()
	f, err := backend.OpenFile(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	flags, err := backend.ParseMountOptions([]string{"allow_other"})
	if err != nil {
		t.Fatal(err)
	}
	m, err := fusefs.Backend{}.Mount(t.Context(), backend.Volume{Primary: f}, dir, backend.Options{Name: "test", Flags: flags})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(m.Unmount(), m.Wait()); err != nil {
			t.Error(err)
		}
	})
}

// access has another process ask, as another user, for each path.
func access(t *testing.T, who asker, dir string, entries []mkerofs.Entry) string {
	t.Helper()
	const script = `cd "$1" && shift && for p; do
		for a in r x; do test -$a "$p" && printf $a || printf -- -; done; printf ' '
	done`
	args := []string{"-c", script, "sh", dir}
	for _, e := range entries {
		args = append(args, e.Path)
	}
	cmd := exec.Command("sh", args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: who.uid, Gid: who.gid, Groups: who.groups}}
	said, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", who.name, err, said)
	}
	return strings.TrimSpace(string(said))
}
