package guest

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// wanted are the modules that a guest has, beside those they depend on.
var wanted = []string{"nbd", "erofs", "loop", "fuse", "overlay", "virtio_pci", "virtio_blk"}

// moduleName is the kernel's name of a module that lies in file, and whether
// file is one.
func moduleName(file string) (string, bool) {
	name, ending, ok := strings.Cut(path.Base(file), ".ko")
	switch ending {
	case "", ".xz", ".zst":
		return strings.ReplaceAll(name, "-", "_"), ok
	}
	return "", false
}

// decompress undoes what the name of the file says was done to it.
func decompress(file string, data []byte) ([]byte, error) {
	switch path.Ext(file) {
	case ".xz":
		r, err := xz.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	case ".zst":
		r, err := zstd.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	}
	return data, nil
}

// A module is one that is loaded.
type module struct {
	name string
	data []byte // an ELF object
}

// A moduleSet is the modules of a kernel package, as they lie there.
type moduleSet struct {
	files   map[string]string // name → path in the package
	data    map[string][]byte // path → content
	builtin map[string]bool   // names of those that the kernel itself contains
}

// closure returns the named modules and what they depend on, each after what it
// depends on. A package of Debian has no modules.dep: depmod writes it at
// installation, so the dependencies are read from the modules.
func (s *moduleSet) closure(names []string) ([]module, error) {
	var order []module
	seen := make(map[string]bool)
	var visit func(name string) error
	visit = func(name string) error {
		if seen[name] || s.builtin[name] {
			return nil
		}
		seen[name] = true
		file, ok := s.files[name]
		if !ok {
			return fmt.Errorf("module %s is not in the kernel package", name)
		}
		data, err := decompress(file, s.data[file])
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		needs, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		for _, n := range needs {
			if err := visit(n); err != nil {
				return fmt.Errorf("%w (needed by %s)", err, name)
			}
		}
		order = append(order, module{name, data})
		return nil
	}
	for _, name := range names {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// dependencies are the "depends" of a module's .modinfo section, a sequence of
// KEY=VALUE, each ended by a zero byte.
func dependencies(object []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}
