package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry"
)

// fileScheme says that a path follows, whatever it looks like.
const fileScheme = "file:"

// refHelp describes REF to users of a command.
const refHelp = "REF is [docker://]HOST/REPOSITORY[:TAG][@DIGEST]; without HOST it is docker.io's. What begins\n" +
	"with /, ./, ../ or file: is the path of an image in a file or on a block device.\n"

// An imageRef names an image: by a reference of a registry, or by a path.
type imageRef struct {
	typed    string
	registry registry.Reference
	path     string // absolute; "" for an image of a registry
}

// parseRef reads what a user typed. A path begins with "/", "./", "../" or
// "file:"; all else is of a registry, whatever files there are.
func parseRef(typed string) (imageRef, error) {
	r := imageRef{typed: typed}
	path, scheme := strings.CutPrefix(typed, fileScheme)
	var err error
	switch {
	case scheme && path == "":
		return r, usagef("reference %q: a path is missing after %s", typed, fileScheme)
	case scheme, strings.HasPrefix(typed, "/"), strings.HasPrefix(typed, "./"), strings.HasPrefix(typed, "../"):
		r.path, err = absolute(path)
	default:
		r.registry, err = registry.ParseReference(typed)
		err = r.hint(err)
	}
	return r, err
}

func (r imageRef) local() bool { return r.path != "" }

// String reads back as the same image from any directory.
func (r imageRef) String() string {
	if r.local() {
		return fileScheme + r.path
	}
	return r.registry.String()
}

// mountName is what df(1) and /proc/mounts show: what was typed, since mount -a
// compares it with fstab, unless that means something in one directory only.
func (r imageRef) mountName() string {
	if r.local() && !strings.HasPrefix(r.typed, "/") && !strings.HasPrefix(r.typed, fileScheme+"/") {
		return r.path
	}
	return r.typed
}

// hint adds to an error that a file of this name is here, and how to name it.
func (r imageRef) hint(err error) error {
	if err == nil || r.local() || strings.Contains(r.typed, "://") {
		return err
	}
	if st, statErr := os.Stat(r.typed); statErr != nil || st.IsDir() {
		return err
	}
	return fmt.Errorf("%w; there is a file of this name here: ./%s would name it", err, filepath.Clean(r.typed))
}

// localOptions checks the flags that go with an image in a file.
func (s *sourceOptions) localOptions(c *cli.Context) error {
	for _, f := range append(append(sourceFlags(), recordFlag()), prefetchFlags()...) {
		if name := f.Names()[0]; c.IsSet(name) {
			return usagef("--%s is for images of registries, and %s is a file", name, s.ref.path)
		}
	}
	for _, path := range c.StringSlice("device") {
		if path = strings.TrimPrefix(path, fileScheme); path == "" {
			return usagef("--device needs the path of a file")
		}
		abs, err := absolute(path)
		if err != nil {
			return err
		}
		s.devices = append(s.devices, abs)
	}
	return nil
}

// openFiles opens the image and its devices.
func (o *opened) openFiles(ctx context.Context, paths []string, offset int64) error {
	for _, path := range paths {
		f, err := backend.OpenFile(path)
		if err != nil {
			return err
		}
		o.files = append(o.files, f)
	}
	o.primary = o.files[0]
	if offset > 0 {
		if size := o.primary.Size(); offset > size {
			return fmt.Errorf("%s has %d bytes: no image can begin at %d", paths[0], size, offset)
		}
		o.primary = tail{o.primary, offset}
	}
	var err error
	o.id, err = fingerprint(ctx, o.primary)
	return err
}

// tail is what of a source comes after its first bytes.
type tail struct {
	backend.Source
	skip int64
}

func (t tail) Size() int64 { return t.Source.Size() - t.skip }

func (t tail) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off < 0 || off > t.Size()-int64(len(p)) {
		return fmt.Errorf("%d bytes at %d lie outside the image's %d bytes: %w", len(p), off, t.Size(), io.ErrUnexpectedEOF)
	}
	return t.Source.ReadAt(ctx, p, t.skip+off)
}

// fingerprintBytes is how much of a file its fingerprint depends on.
const fingerprintBytes = 256 << 10

// fingerprint tells an image in a file from others, without reading all of it: the
// superblock with its checksum and UUID, and usually some files, are in what is
// read.
func fingerprint(ctx context.Context, src backend.Source) (string, error) {
	head := make([]byte, min(fingerprintBytes, src.Size()))
	if err := src.ReadAt(ctx, head, 0); err != nil {
		return "", err
	}
	sum := sha256.Sum256(append(head, strconv.FormatInt(src.Size(), 10)...))
	return "file-sha256:" + hex.EncodeToString(sum[:]), nil
}

// explainLocal adds to an error of an image in a file which file was looked at,
// and that devices of it are missing where that is the likely reason.
func (o *opened) explainLocal(err error) error {
	switch {
	case errors.Is(err, erofsfmt.ErrNotErofs):
		return fmt.Errorf("%s: %w", o.ref.path, err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.Join(err, o.missingDevices())
	}
	return err
}

// missingDevices says that the image keeps data on devices that were not given,
// and not in the file itself either.
func (o *opened) missingDevices() error {
	if !o.ref.local() || len(o.files) > 1 || o.super == nil {
		return nil
	}
	for _, d := range o.super.Devices {
		blocks := uint64(o.primary.Size()) >> o.super.BlockBits
		if d.Blocks > 0 && (d.Uniaddr == 0 || d.Uniaddr > blocks || d.Blocks > blocks-d.Uniaddr) {
			return fmt.Errorf("%s keeps data on extra devices (%d): name the file of each with --device, in the order of its device table",
				o.ref.path, len(o.super.Devices))
		}
	}
	return nil
}

// checkDevices finds out before a mount what its readers would find out as EIO.
// What else is the matter with an image the backend says.
func (o *opened) checkDevices(ctx context.Context) error {
	if !o.ref.local() || len(o.files) > 1 {
		return nil
	}
	if _, err := o.openErofs(ctx, 0); err != nil {
		return nil
	}
	return o.missingDevices()
}

// parseMemory reads a size as erofsfmt.Options.CacheBytes has it.
func parseMemory(s string) (int64, error) {
	n, err := parseSize("memory", s)
	if err == nil && n == 0 {
		n = -1
	}
	return n, err
}

// reopenFiles opens the files of a record, if they are what they were.
func reopenFiles(ctx context.Context, rec backend.Record) (_ *opened, err error) {
	o := &opened{ref: imageRef{typed: rec.Reference, path: rec.Files[0].Path}}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.Close())
		}
	}()
	var paths []string
	for _, f := range rec.Files {
		paths = append(paths, f.Path)
	}
	if err := o.openFiles(ctx, paths, 0); err != nil {
		return nil, err
	}
	for i, f := range o.files {
		if now := f.State(); now != rec.Files[i] {
			return nil, fmt.Errorf("%s is not the file that was mounted on %s: it was changed or replaced", now.Path, rec.Dir)
		}
	}
	return o, nil
}
