package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/tarlayer"
)

// treeHelp describes SOURCE to users of a command.
const treeHelp = "SOURCE is an image, [docker://]HOST/REPOSITORY[:TAG][@DIGEST], oci:DIR[:NAME],\n" +
	"oci-archive:FILE[:NAME] or docker-archive:FILE[:NAME]; a directory, or a file with a tar archive\n" +
	"(as it is, or by gzip, zstd, xz or bzip2) or an EROFS image, whose path begins with /, ./, ../ or\n" +
	"file: or ends in .tar, .tar.gz, .erofs and the like; or - for a tar archive on standard input.\n"

// The places where a tree, or an image with layers, can be.
type placeKind int

const (
	inRegistry placeKind = iota
	inPath               // a directory, an archive, an EROFS image
	inStdin
	inLayout
	inOCIArchive
	inDockerArchive
)

// A place is what a user named as a source or a destination.
type place struct {
	typed string
	kind  placeKind
	ref   registry.Reference // in a registry
	path  string             // elsewhere; absolute
	name  string             // of an image in a layout or an archive
}

// archiveEndings are those of files that need no ./ to be taken for such.
func archiveEndings() []string {
	return []string{".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".erofs"}
}

// parsePlace reads what a user typed.
func parsePlace(typed string) (place, error) {
	p := place{typed: typed}
	if typed == "-" {
		p.kind = inStdin
		return p, nil
	}
	for scheme, kind := range map[string]placeKind{"oci:": inLayout, "oci-archive:": inOCIArchive, "docker-archive:": inDockerArchive} {
		rest, ok := strings.CutPrefix(typed, scheme)
		if !ok {
			continue
		}
		p.kind = kind
		p.path, p.name, _ = strings.Cut(rest, ":")
		if p.path == "" {
			return p, usagef("%q: a path is missing after %s", typed, scheme)
		}
		var err error
		p.path, err = filepath.Abs(p.path)
		return p, err
	}
	if endsLikeArchive(typed) && !strings.Contains(typed, "://") && !strings.HasPrefix(typed, fileScheme) {
		if st, err := os.Stat(typed); err == nil && st.Mode().IsRegular() {
			p.kind = inPath
			p.path, err = filepath.Abs(typed)
			return p, err
		}
	}
	if typed == "." || typed == ".." {
		typed += "/"
	}
	ref, err := parseRef(typed)
	if err != nil {
		return p, err
	}
	p.ref = ref.registry
	if ref.local() {
		p.kind, p.path = inPath, ref.path
	}
	return p, nil
}

func endsLikeArchive(name string) bool {
	for _, end := range archiveEndings() {
		if strings.HasSuffix(name, end) {
			return true
		}
	}
	return false
}

// baseName is what a file made of the place is called, without an ending.
func (p place) baseName() string {
	switch p.kind {
	case inStdin:
		return ""
	case inRegistry:
		name := p.ref.Repository[strings.LastIndexByte(p.ref.Repository, '/')+1:]
		if p.ref.Tag != "" {
			name += "-" + p.ref.Tag
		}
		return name
	}
	name := filepath.Base(p.path)
	for _, end := range archiveEndings() {
		name = strings.TrimSuffix(name, end)
	}
	if p.name != "" {
		name += "-" + strings.NewReplacer("/", "-", ":", "-").Replace(p.name)
	}
	return name
}

// A tree is a file system tree that an image can be made of.
type tree interface {
	// fill puts the tree on top of what l has. Files are read until Close, so that comes after the end of l's builder.
	fill(ctx context.Context, l *mkerofs.Layers) error
	Close() error
}

// errStop ends a walk whose caller has seen enough.
var errStop = errors.New("stop")

// treeOptions say how a tree is read.
type treeOptions struct {
	selector registry.Selector // of an image
	client   registry.Options
	oneFS    bool     // of a directory
	output   []fileID // are no part of one, though they may be there: what is made, and what it replaces
	stdin    io.Reader
	scratch  *scratch
	steps    *steps
}

// treeOptions reads the flags that say how a source is read.
func (p *program) treeOptions(c *cli.Context, how *buildOptions) (treeOptions, error) {
	log, err := p.newCommandLog(c)
	if err != nil {
		return treeOptions{}, err
	}
	s := &sourceOptions{}
	if err := p.registryOptions(c, s, log); err != nil {
		return treeOptions{}, err
	}
	s.selector.Prefer = registry.PreferTar
	return treeOptions{
		selector: s.selector, client: s.client, oneFS: c.Bool("one-file-system"), stdin: p.stdin,
		scratch: &scratch{dir: how.tmp, limit: how.tmpLimit}, steps: p.newSteps(how.quiet),
	}, nil
}

// openTree opens what at names.
func openTree(ctx context.Context, at place, o treeOptions) (tree, error) {
	if of := at.kind == inPath || at.kind == inStdin; of && (o.selector.Layer != nil || o.selector.Platform != "") {
		return nil, usagef("--layer and --platform choose in a container image, and %s is none", at.typed)
	}
	switch at.kind {
	case inPath:
		return openPathTree(ctx, at, o)
	case inStdin:
		return &tarTree{name: "standard input", r: o.stdin}, nil
	}
	s, err := openStore(at, o.client)
	if err != nil {
		return nil, err
	}
	t, err := openImageTree(ctx, s, o)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return t, nil
}

func openPathTree(ctx context.Context, at place, o treeOptions) (tree, error) {
	st, err := os.Stat(at.path)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		t, err := openDirTree(at.path, o.oneFS)
		if err != nil {
			return nil, err
		}
		t.except = o.output
		return t, nil
	}
	f, err := backend.OpenFile(at.path)
	if err != nil {
		return nil, err
	}
	im, err := erofsfmt.Open(ctx, f)
	if err == nil {
		return &erofsTree{im: im, source: f}, nil
	}
	if !errors.Is(err, erofsfmt.ErrNotErofs) {
		return nil, errors.Join(fmt.Errorf("%s: %w", at.path, err), f.Close())
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	archive, err := os.Open(at.path)
	return &tarTree{name: at.path, r: archive, file: archive}, err
}

// A tarTree is the tree that a tar archive makes.
type tarTree struct {
	name string
	r    io.Reader
	file *os.File // nil for what cannot be read at random
}

func (t *tarTree) fill(ctx context.Context, l *mkerofs.Layers) (err error) {
	r := t.r
	if f, ok := r.(*os.File); ok && t.file == nil {
		in, openErr := newInput(ctx, f)
		if openErr != nil {
			return openErr
		}
		defer func() { err = errors.Join(err, in.Close()) }()
		r = in
	}
	archive, err := tarlayer.Open(r, ocispec.Descriptor{}, "")
	if err != nil {
		return fmt.Errorf("%s: %w", t.name, err)
	}
	defer func() { err = errors.Join(err, archive.Close()) }()
	if t.file != nil && archive.Compression() == tarlayer.None {
		st, err := t.file.Stat()
		if err == nil && st.Mode().IsRegular() && st.Size() > 0 {
			return notArchive(t.name, l.ApplyAt(ctx, t.file, st.Size()))
		}
	}
	err = l.Apply(ctx, archive)
	if err == nil {
		// What is behind the archive's end belongs to what was compressed, and its checksum is to be seen.
		_, err = io.Copy(io.Discard, archive)
	}
	if err == nil && archive.Size() == 0 {
		err = errors.New("is empty; a tar archive has at least two blocks of zeros")
	}
	return notArchive(t.name, err)
}

func notArchive(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

func (t *tarTree) Close() error {
	if t.file == nil {
		return nil
	}
	return t.file.Close()
}

// An erofsTree is the tree of an EROFS image.
type erofsTree struct {
	im     *erofsfmt.Image
	source io.Closer
}

func (t *erofsTree) fill(ctx context.Context, l *mkerofs.Layers) error {
	return l.ApplyEntries(ctx, imageEntries(ctx, ctx, t.im), mkerofs.WhiteoutsNone)
}

func (t *erofsTree) Close() error { return t.source.Close() }

// An openedStore is a store with what has to be closed after it.
type openedStore struct {
	registry.Store
	client *registry.Client // of a registry
	close  func() error
}

func (s *openedStore) Close() error { return s.close() }

// openStore opens the store of images that at names.
func openStore(at place, o registry.Options) (*openedStore, error) {
	switch at.kind {
	case inLayout:
		l, err := registry.OpenLayout(at.path, at.name)
		if err != nil {
			return nil, err
		}
		return &openedStore{Store: l, close: l.Close}, nil
	case inOCIArchive, inDockerArchive:
		a, err := registry.OpenArchive(at.path, at.name)
		if err != nil {
			return nil, err
		}
		return &openedStore{Store: a, close: a.Close}, nil
	case inRegistry:
		c, err := registry.New(o)
		if err != nil {
			return nil, err
		}
		return &openedStore{Store: c.Repository(at.ref), client: c, close: c.Close}, nil
	}
	return nil, usagef("%s holds no container image; give one of a registry, oci:DIR, oci-archive:FILE or docker-archive:FILE", at.typed)
}
