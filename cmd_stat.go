package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func (p *program) statCommand() *cli.Command {
	return &cli.Command{
		Name:        "stat",
		Usage:       "show what an image says of a file",
		ArgsUsage:   "REF PATH",
		Description: refHelp + "A symbolic link is shown itself; those on the way to it are followed.",
		Flags:       append([]cli.Flag{jsonFlag()}, imageFlags()...),
		Action: func(c *cli.Context) error {
			args, err := arguments(c, "REF", "PATH")
			if err != nil {
				return err
			}
			return p.withImage(c, args[0], func(ctx context.Context, im *erofsfmt.Image) error {
				s, err := statFile(ctx, im, args[1])
				if err != nil {
					return err
				}
				if c.Bool("json") {
					return printJSON(p.stdout, s)
				}
				return s.print(p.stdout)
			})
		},
	}
}

// fileStatus is what stat prints; its JSON form is for programs. Names and targets
// that are not UTF-8 are there in their quoted form.
type fileStatus struct {
	Path   string      `json:"path"`
	Type   string      `json:"type"`
	Nid    uint64      `json:"nid"`
	Inode  uint64      `json:"inode"`
	Mode   string      `json:"mode"` // octal, with the type
	UID    uint32      `json:"uid"`
	GID    uint32      `json:"gid"`
	Links  uint32      `json:"links"`
	Size   int64       `json:"size"`
	Blocks uint64      `json:"blocks"` // of 512 bytes
	Mtime  string      `json:"mtime"`  // RFC 3339, UTC
	Target string      `json:"target,omitempty"`
	Device string      `json:"device,omitempty"` // major:minor
	Xattrs []fileXattr `json:"xattrs,omitempty"`

	mode uint32
}

type fileXattr struct {
	Name  string `json:"name"`
	Value []byte `json:"value"` // in JSON: base64
}

func typeName(mode uint32) string {
	names := map[uint32]string{
		unix.S_IFREG: "regular file", unix.S_IFDIR: "directory", unix.S_IFLNK: "symbolic link", unix.S_IFCHR: "character device",
		unix.S_IFBLK: "block device", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
	}
	if n, ok := names[mode&unix.S_IFMT]; ok {
		return n
	}
	return "unknown"
}

func statFile(ctx context.Context, im *erofsfmt.Image, name string) (*fileStatus, error) {
	ino, err := findPath(ctx, im, name, false)
	if err != nil {
		return nil, err
	}
	s := &fileStatus{
		Path: printable(name), Type: typeName(ino.Mode), Nid: uint64(ino.Nid), Inode: ino.Ino, Mode: fmt.Sprintf("%07o", ino.Mode),
		UID: ino.UID, GID: ino.GID, Links: ino.Nlink, Size: ino.Size, Blocks: ino.Blocks,
		Mtime: time.Unix(ino.Mtime, int64(ino.MtimeNsec)).UTC().Format(time.RFC3339Nano), mode: ino.Mode,
	}
	switch fileType(&ino) {
	case unix.S_IFLNK:
		target, err := im.Readlink(ctx, &ino)
		if err != nil {
			return nil, notThere(name, err)
		}
		s.Target = printable(target)
	case unix.S_IFCHR, unix.S_IFBLK:
		s.Device = fmt.Sprintf("%d:%d", ino.Major(), ino.Minor())
	}
	all, err := readXattrs(ctx, im, &ino)
	for _, x := range all {
		s.Xattrs = append(s.Xattrs, fileXattr{printable(x.name), x.value})
	}
	return s, notThere(name, err)
}

// An xattr is an extended attribute.
type xattr struct {
	name  string
	value []byte
}

func readXattrs(ctx context.Context, im *erofsfmt.Image, ino *erofsfmt.Inode) ([]xattr, error) {
	if !ino.HasXattrs() {
		return nil, nil
	}
	names, err := im.Xattrs(ctx, ino)
	if err != nil {
		return nil, err
	}
	var all []xattr
	for _, n := range names {
		value, err := im.Xattr(ctx, ino, n)
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", printable(n), err)
		}
		all = append(all, xattr{n, value})
	}
	return all, nil
}

func (s *fileStatus) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	line("path:", "%s", s.Path)
	line("type:", "%s", s.Type)
	if s.Target != "" {
		line("target:", "%s", s.Target)
	}
	if s.Device != "" {
		line("device:", "%s", s.Device)
	}
	line("size:", "%d bytes, %d blocks of 512", s.Size, s.Blocks)
	line("mode:", "%04o %s", s.mode&^unix.S_IFMT, modeString(s.mode))
	line("owner:", "%d:%d", s.UID, s.GID)
	line("links:", "%d", s.Links)
	line("changed:", "%s", s.Mtime)
	line("inode:", "%d (nid %d)", s.Inode, s.Nid)
	for _, x := range s.Xattrs {
		line("xattr:", "%s=%s", x.Name, strconv.Quote(string(x.Value)))
	}
	return t.Flush()
}
