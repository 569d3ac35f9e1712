package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/erofs-oci/erofs-oci/tests/debian"
)

// A Kernel is what was taken out of a kernel package.
type Kernel struct {
	// Package names the package, and with it the version.
	Package string
	// Image is the file to boot, Modules those to load, in this order.
	Image   string
	Modules []string
}

// Cache is where kernels are kept: $EROFS_OCI_GUEST_CACHE, else a directory
// below the user's cache directory.
func Cache() (string, error) {
	if dir := os.Getenv("EROFS_OCI_GUEST_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "erofs-oci-guest"), err
}

// metaPackage depends on the newest kernel of a suite. The kernels for clouds
// have few drivers and boot fast.
const metaPackage = "linux-image-cloud-amd64"

// Fetch returns the kernel of a Debian suite such as "bookworm" or
// "bookworm-backports", out of the cache or from the machine's mirror.
func Fetch(ctx context.Context, cache, suite string) (*Kernel, error) {
	sum := sha256.Sum256([]byte(strings.Join(wanted, " ")))
	dir, err := kept(cache, fmt.Sprintf("%s-%x", suite, sum[:4]), func(work, dir string) error {
		return download(ctx, work, suite, dir)
	})
	if err != nil {
		return nil, fmt.Errorf("kernel of %s: %w", suite, err)
	}
	return open(dir)
}

// open reads a directory that unpack wrote.
func open(dir string) (*Kernel, error) {
	name, err := os.ReadFile(filepath.Join(dir, "package"))
	if err != nil {
		return nil, err
	}
	// Their names sort in the order in which they are loaded.
	modules, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return nil, err
	}
	slices.Sort(modules)
	return &Kernel{Package: string(name), Image: filepath.Join(dir, "vmlinuz"), Modules: modules}, nil
}

// download brings the suite's kernel package into work and unpacks it into dir.
func download(ctx context.Context, work, suite, dir string) error {
	a, err := debian.NewApt(ctx, work, suite)
	if err != nil {
		return err
	}
	out, err := a.Run(ctx, "apt-cache", "depends", "--important", metaPackage)
	if err != nil {
		return err
	}
	found := regexp.MustCompile(`(?m)^ *Depends: (linux-image-\S+)$`).FindSubmatch(out)
	if found == nil {
		return fmt.Errorf("%s depends on no kernel: %s", metaPackage, out)
	}
	name := string(found[1])
	if _, err := a.Run(ctx, "apt-get", "-qq", "download", name); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(work, name+"_*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download %s brought %d files (%v)", name, len(debs), err)
	}
	return unpack(ctx, debs[0], name, dir)
}

// output is cmd.Output with what the command complained of in the error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}

// unpack takes the kernel and the wanted modules out of a package.
func unpack(ctx context.Context, deb, name, dir string) error {
	content, err := output(exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb))
	if err != nil {
		return err
	}
	image, set, err := readPackage(bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("%s: %w", deb, err)
	}
	modules, err := set.closure(wanted)
	if err != nil {
		return fmt.Errorf("%s: %w", deb, err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for i, m := range modules {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%02d-%s.ko", i, m.name)), m.data, 0o644); err != nil {
			return err
		}
	}
	return errors.Join(os.WriteFile(filepath.Join(dir, "vmlinuz"), image, 0o644),
		os.WriteFile(filepath.Join(dir, "package"), []byte(name), 0o644))
}

// readPackage collects the kernel and all modules of a package's tar archive.
func readPackage(r io.Reader) (image []byte, set *moduleSet, err error) {
	set = &moduleSet{files: map[string]string{}, data: map[string][]byte{}, builtin: map[string]bool{}}
	for files := tar.NewReader(r); ; {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil, err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		data, err := io.ReadAll(files)
		if err != nil {
			return nil, nil, err
		}
		base := filepath.Base(h.Name)
		if name, ok := moduleName(h.Name); ok {
			set.files[name], set.data[h.Name] = h.Name, data
		} else if base == "modules.builtin" {
			for line := range strings.Lines(string(data)) {
				if name, ok := moduleName(strings.TrimSpace(line)); ok {
					set.builtin[name] = true
				}
			}
		} else if strings.HasPrefix(base, "vmlinuz-") {
			image = data
		}
	}
	if image == nil {
		return nil, nil, errors.New("no vmlinuz in the package")
	}
	return image, set, nil
}
