package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func (p *program) lsCommand() *cli.Command {
	return &cli.Command{
		Name:      "ls",
		Usage:     "list a directory of an image",
		ArgsUsage: "REF [PATH]",
		Description: refHelp + "PATH is a path in the image, its root if it is not given. All names are listed, in the\n" +
			"order of the image; those that could steer a terminal are quoted.",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "l", Usage: "with mode, links, owner, group, size and time of the last change"},
			&cli.BoolFlag{Name: "R", Usage: "with the directories below"},
		}, imageFlags()...),
		Action: func(c *cli.Context) error {
			args, err := argumentsAtLeast(c, 1, "REF", "[PATH]")
			if err != nil {
				return err
			}
			if len(args) > 2 {
				return wrongNumber(c, "REF and one PATH", len(args))
			}
			name := append(args, ".")[1]
			return p.withImage(c, args[0], func(ctx context.Context, im *erofsfmt.Image) error {
				w := bufio.NewWriter(p.stdout)
				l := &lister{ctx: ctx, im: im, w: w, long: c.Bool("l"), recursive: c.Bool("R"), dirs: dirSet{}}
				// What was found before an error is shown.
				return errors.Join(l.list(name), w.Flush())
			})
		},
	}
}

type lister struct {
	ctx             context.Context
	im              *erofsfmt.Image
	w               io.Writer
	long, recursive bool
	dirs            dirSet
}

func (l *lister) list(name string) error {
	ino, err := findPath(l.ctx, l.im, name, !l.long)
	if err != nil {
		return err
	}
	if !ino.IsDir() {
		return l.line(name, imageFile{name, ino})
	}
	return l.dir(imageFile{name, ino})
}

// dir lists a directory and then those in it, as ls(1) does.
func (l *lister) dir(dir imageFile) error {
	if l.recursive {
		fmt.Fprintf(l.w, "%s:\n", printable(dir.path))
		if err := l.dirs.enter(dir.path, &dir.ino); err != nil {
			return err
		}
	}
	var below []imageFile
	err := eachFile(l.ctx, l.im, dir, func(f imageFile) error {
		if l.recursive && f.ino.IsDir() {
			below = append(below, f)
		}
		return l.line(f.name(), f)
	})
	for _, d := range below {
		if err != nil {
			return err
		}
		fmt.Fprintln(l.w)
		err = l.dir(d)
	}
	return err
}

func (l *lister) line(shown string, f imageFile) error {
	if !l.long {
		_, err := fmt.Fprintln(l.w, printable(shown))
		return err
	}
	ino := &f.ino
	size := fmt.Sprint(ino.Size)
	target := ""
	switch fileType(ino) {
	case unix.S_IFCHR, unix.S_IFBLK:
		size = fmt.Sprintf("%d, %d", ino.Major(), ino.Minor())
	case unix.S_IFLNK:
		to, err := l.im.Readlink(l.ctx, ino)
		if err != nil {
			return notThere(f.path, err)
		}
		target = " -> " + printable(to)
	}
	_, err := fmt.Fprintf(l.w, "%s %3d %5d %5d %10s %s %s%s\n", modeString(ino.Mode), ino.Nlink, ino.UID, ino.GID, size,
		time.Unix(ino.Mtime, int64(ino.MtimeNsec)).Format("2006-01-02 15:04:05"), printable(shown), target)
	return err
}

// modeString is a mode as ls(1) shows it.
func modeString(mode uint32) string {
	types := map[uint32]byte{
		unix.S_IFREG: '-', unix.S_IFDIR: 'd', unix.S_IFLNK: 'l', unix.S_IFCHR: 'c', unix.S_IFBLK: 'b', unix.S_IFIFO: 'p', unix.S_IFSOCK: 's',
	}
	s := []byte("?rwxrwxrwx")
	if t, ok := types[mode&unix.S_IFMT]; ok {
		s[0] = t
	}
	for i := range 9 {
		if mode&(0o400>>i) == 0 {
			s[1+i] = '-'
		}
	}
	for _, special := range []struct {
		bit        uint32
		at         int
		with, only byte
	}{{unix.S_ISUID, 3, 's', 'S'}, {unix.S_ISGID, 6, 's', 'S'}, {unix.S_ISVTX, 9, 't', 'T'}} {
		if mode&special.bit == 0 {
			continue
		}
		if s[special.at] == 'x' {
			s[special.at] = special.with
		} else {
			s[special.at] = special.only
		}
	}
	return string(s)
}
