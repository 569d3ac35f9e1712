package guest

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
)

// writeInitramfs writes the files (their path in the guest, and their path here)
// and the texts (path, content) as a cpio archive in the "newc" form, the one
// that kernels unpack: Documentation/driver-api/early-userspace/buffer-format.rst.
func writeInitramfs(w io.Writer, files, texts map[string]string) error {
	a := &archive{w: w, dirs: map[string]bool{".": true}}
	// PID 1 speaks on the console before it has mounted anything.
	if err := a.parents("dev/console"); err != nil {
		return err
	}
	if err := a.entry("dev/console", modeCharDevice|0o600, 0, consoleRdev, nil); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := a.file(clean(name), files[name]); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		if err := a.parents(clean(name)); err != nil {
			return err
		}
		text := texts[name]
		if err := a.entry(clean(name), modeFile|0o644, int64(len(text)), [2]uint32{}, strings.NewReader(text)); err != nil {
			return err
		}
	}
	return a.entry("TRAILER!!!", 0, 0, [2]uint32{}, nil)
}

// Type bits of st_mode, and the device number of /dev/console.
const (
	modeDir        = 0o040000
	modeFile       = 0o100000
	modeCharDevice = 0o020000
)

var consoleRdev = [2]uint32{5, 1}

type archive struct {
	w    io.Writer
	ino  int
	dirs map[string]bool
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (a *archive) file(name, source string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := a.parents(name); err != nil {
		return err
	}
	return a.entry(name, modeFile|uint32(st.Mode().Perm()), st.Size(), [2]uint32{}, f)
}

// parents adds the directories above name that are not there yet.
func (a *archive) parents(name string) error {
	dir := path.Dir(name)
	if a.dirs[dir] {
		return nil
	}
	if err := a.parents(dir); err != nil {
		return err
	}
	a.dirs[dir] = true
	return a.entry(dir, modeDir|0o755, 0, [2]uint32{}, nil)
}

// entry writes a header of thirteen hexadecimal numbers, the name, and the
// content; name and content are padded to four bytes.
func (a *archive) entry(name string, mode uint32, size int64, rdev [2]uint32, content io.Reader) error {
	if size >= 1<<32 {
		return fmt.Errorf("%s: %d bytes are too many for a cpio archive", name, size)
	}
	a.ino++
	var header strings.Builder
	header.WriteString("070701")
	for _, v := range []int64{int64(a.ino), int64(mode), 0, 0, 1, 0, size, 0, 0, int64(rdev[0]), int64(rdev[1]), int64(len(name) + 1), 0} {
		fmt.Fprintf(&header, "%08x", v)
	}
	header.WriteString(name)
	header.WriteString(strings.Repeat("\x00", 1+pad(header.Len()+1)))
	if _, err := io.WriteString(a.w, header.String()); err != nil {
		return err
	}
	if content == nil {
		return nil
	}
	if _, err := io.CopyN(a.w, content, size); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	_, err := io.WriteString(a.w, strings.Repeat("\x00", pad(int(size))))
	return err
}

func pad(n int) int { return -n & 3 }
