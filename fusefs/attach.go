package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/backend"
)

// attach mounts a FUSE file system on target and returns the descriptor of its
// connection. go-fuse can do it, too, but keeps the reasons of a refusal to
// itself. The descriptor is a plain number, since an *os.File would be made
// non-blocking, and go-fuse's readers block.
func (b Backend) attach(target string, o backend.Options) (int, error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return -1, noDevice(err)
	}
	if err == nil {
		err = b.attachDirectly(dev, target, o)
		if err == nil {
			return dev, nil
		}
		unix.Close(dev)
		if !errors.Is(err, fs.ErrPermission) {
			return -1, fmt.Errorf("mount %s: %w", target, err)
		}
	}
	if _, lookErr := backend.Fusermount(); lookErr != nil {
		return -1, noRight(err, lookErr)
	}
	return b.attachByHelper(target, o)
}

// noDevice and noRight say in one line what is missing and the next best way.
func noDevice(err error) error {
	return fmt.Errorf("FUSE is not to be had here (%w): load the fuse module, or give the container the device (--device /dev/fuse)", err)
}

func noRight(err, lookErr error) error {
	return fmt.Errorf("no right to mount (%w) and %w: install fuse3, or run in a user namespace of your own (unshare -Urm), or give the container CAP_SYS_ADMIN", err, lookErr)
}

// attachDirectly calls mount(2): as root, or as the owner of a user namespace.
func (b Backend) attachDirectly(dev int, target string, o backend.Options) error {
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,max_read=%d",
		dev, os.Geteuid(), os.Getegid(), b.maxRead())
	if !b.unchecked(o) {
		data += ",default_permissions"
	}
	if o.Flags.AllowOther {
		data += ",allow_other"
	}
	return unix.Mount(o.Name, target, b.fuseType(), unix.MS_RDONLY|o.Flags.Flags, data)
}

// helperWords are the options that fusermount3 knows.
var helperWords = []string{"suid", "nosuid", "dev", "nodev", "exec", "noexec", "noatime"}

// attachByHelper has fusermount3 mount, which hands the connection back over a
// socket.
func (b Backend) attachByHelper(target string, o backend.Options) (int, error) {
	_, subtype, _ := strings.Cut(b.fuseType(), ".")
	words := []string{"ro", fmt.Sprintf("max_read=%d", b.maxRead()), "subtype=" + escape(subtype), "fsname=" + escape(o.Name)}
	for _, w := range o.Flags.Words {
		if w == "relatime" {
			continue // the kernel's default
		}
		if !slices.Contains(helperWords, w) {
			return -1, fmt.Errorf("mount option %q: only root can set it on a FUSE mount; leave it out", w)
		}
		words = append(words, w)
	}
	if !b.unchecked(o) {
		words = append(words, "default_permissions")
	}
	if o.Flags.AllowOther {
		words = append(words, "allow_other")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount"), os.NewFile(uintptr(pair[1]), "fusermount")
	defer ours.Close()
	cmd, err := backend.Fusermount("-o", strings.Join(words, ","), "--", target)
	if err != nil {
		return -1, err
	}
	cmd.Env = append(cmd.Env, "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	var said bytes.Buffer
	cmd.Stderr = &said
	err = cmd.Run()
	theirs.Close()
	if err != nil {
		return -1, fmt.Errorf("mount %s: %s (%w)", target, oneLine(said.String()), err)
	}
	return receive(int(ours.Fd()))
}

func receive(socket int) (int, error) {
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, b[:], oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("receive the connection from fusermount3: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("fusermount3 sent no connection: %w", errors.Join(err, fmt.Errorf("%d control messages", len(messages))))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("fusermount3 sent no connection: %w", errors.Join(err, fmt.Errorf("%d descriptors", len(fds))))
	}
	return fds[0], nil
}

// escape protects what separates options in fusermount3's -o.
func escape(s string) string {
	return strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(s)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
