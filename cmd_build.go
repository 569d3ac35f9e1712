package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

func (p *program) buildCommand() *cli.Command {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write the image to `FILE`", DefaultText: "named after SOURCE, in this directory"},
		&cli.BoolFlag{Name: "overwrite", Usage: "replace FILE if it is there already"},
		&cli.StringFlag{Name: "platform", Usage: "choose `OS/ARCH[/VARIANT]` from an image index (default: this machine's)"},
		&cli.IntFlag{Name: "layer", Value: -1, Usage: "take layer `N` alone, counted from 0, with its whiteouts as overlayfs has them", DefaultText: "all layers, one over the other"},
		&cli.BoolFlag{Name: "one-file-system", Aliases: []string{"x"}, Usage: "of a directory: leave out what other file systems have below it"},
	}
	return &cli.Command{
		Name:      "build",
		Usage:     "make an EROFS image of a container image, a directory or a tar archive",
		ArgsUsage: "SOURCE",
		Description: treeHelp +
			"Of an image all layers are merged, whiteouts applied, and digests and diff IDs verified.\n" +
			"The image is a function of the tree and the options: the same bytes on any machine.",
		Flags:  append(append(flags, buildFlags()...), append(accessFlags(), logFlags()...)...),
		Action: p.build,
	}
}

func (p *program) build(c *cli.Context) (err error) {
	args, err := arguments(c, "SOURCE")
	if err != nil {
		return err
	}
	how, err := readBuildOptions(c)
	if err != nil {
		return err
	}
	at, err := parsePlace(args[0])
	if err != nil {
		return err
	}
	if err := checkSource(c, at); err != nil {
		return err
	}
	o, err := p.treeOptions(c, how)
	if err != nil {
		return err
	}
	defer o.steps.close()
	out, err := createOutput(c.String("output"), at, c.Bool("overwrite"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.abandon()) }()
	if o.output, err = out.ids(); err != nil {
		return err
	}
	made, err := buildTree(c.Context, at, o, how, out.File)
	if err != nil {
		return err
	}
	if err := out.publish(); err != nil {
		return err
	}
	o.steps.close()
	return p.reportBuild(out.name, made, how.quiet)
}

// checkSource refuses options that would do nothing.
func checkSource(c *cli.Context, at place) error {
	if at.kind == inStdin && (c.Bool("creds-stdin") || c.Bool("password-stdin")) {
		return usagef("standard input cannot be both the archive and the password")
	}
	if c.Bool("one-file-system") {
		if st, err := os.Stat(at.path); at.kind != inPath || err == nil && !st.IsDir() {
			return usagef("--one-file-system is for directories, and %s is none", at.typed)
		}
	}
	return nil
}

// A built is what became of a tree.
type built struct {
	size   int64
	digest digest.Digest
	stats  mkerofs.Stats
	took   time.Duration
}

// buildTree makes an image of what at names, in w.
func buildTree(ctx context.Context, at place, o treeOptions, how *buildOptions, w *os.File) (_ *built, err error) {
	begun := time.Now()
	t, err := openTree(ctx, at, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	made, err := how.build(ctx, t.fill, o, w, mkerofs.LayerOptions{Overlay: o.selector.Layer != nil})
	if err != nil {
		return nil, err
	}
	made.took = time.Since(begun)
	return made, nil
}

// build makes an image of what fill puts into it.
func (how *buildOptions) build(ctx context.Context, fill func(context.Context, *mkerofs.Layers) error, o treeOptions, w *os.File, options mkerofs.LayerOptions) (_ *built, err error) {
	var building *step
	b, err := how.newBuilder(w, func(files, bytes int64) { building.set(bytes, fmt.Sprintf(", %d files", files)) })
	if err != nil {
		return nil, err
	}
	options.MaxBytes = how.maxBytes
	options.Warn = func(path, what string) { o.steps.warn("%s: left out: %s", printable(path), what) }
	layers, err := mkerofs.NewLayers(b, options)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, layers.Close()) }()
	if err := fill(ctx, layers); err != nil {
		return nil, how.advise(err)
	}
	building = o.steps.begin("build", contentSize(b))
	made := &built{}
	made.size, err = b.Finish(ctx)
	building.end(err)
	if err != nil {
		return nil, how.advise(err)
	}
	made.stats = b.Stats()
	made.digest, err = digest.FromReader(io.NewSectionReader(w, 0, made.size))
	return made, err
}

// advise adds to an error of the builder, which knows of no flags, what can be done about it.
func (how *buildOptions) advise(err error) error {
	var path *os.PathError
	switch {
	case errors.Is(err, mkerofs.ErrTempLimit):
		return fmt.Errorf("%w; --tmp-limit allows more", err)
	case errors.Is(err, mkerofs.ErrTooMuch):
		return fmt.Errorf("%w; --max-size allows more", err)
	case errors.Is(err, unix.ENOSPC) && errors.As(err, &path) && filepath.Dir(path.Path) == filepath.Clean(how.tmp):
		return fmt.Errorf("%w; --tmp names another directory", err)
	}
	return err
}

// contentSize is how much data the files of a tree have.
func contentSize(b *mkerofs.Builder) (n int64) {
	for e := range b.Entries() {
		n += e.Size
	}
	return n
}

// reportBuild prints the closing line.
func (p *program) reportBuild(name string, made *built, quiet bool) error {
	if quiet {
		_, err := fmt.Fprintln(p.stdout, made.digest)
		return err
	}
	_, err := fmt.Fprintf(p.stdout, "%s: %s\n", name, made)
	return err
}

func (m *built) String() string {
	text := sizeText(m.size)
	if m.stats.Content > 0 {
		text += fmt.Sprintf(", %.1f %% of the %s in %d files", 100*float64(m.size)/float64(m.stats.Content), sizeText(m.stats.Content), m.stats.Files)
	}
	return fmt.Sprintf("%s; %.1f s; %s", text, m.took.Seconds(), m.digest)
}

// An output is a file that comes to its name only when it is whole.
type output struct {
	*os.File
	name    string
	replace bool
	done    bool
}

// createOutput begins the file called name, or, without a name, one that is called after where its content is from.
func createOutput(name string, at place, replace bool) (*output, error) {
	if name == "" {
		if name = at.baseName(); name == "" || name == "." || name == "/" {
			return nil, usagef("%s gives the image no name; name a file with --output", at.typed)
		}
		name += ".erofs"
	}
	st, err := os.Stat(name)
	switch {
	case err == nil && !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file; choose another name with --output", name)
	case err == nil && !replace:
		return nil, fmt.Errorf("%s is there already; --overwrite replaces it", name)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return nil, err
	}
	return &output{File: f, name: name, replace: replace}, nil
}

// ids tell the file from others, and the one that it is to replace, if there is one.
func (o *output) ids() ([]fileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(o.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: o.File.Name(), Err: err}
	}
	ids := []fileID{{st.Dev, st.Ino}}
	err := unix.Stat(o.name, &st)
	switch {
	case err == nil:
		ids = append(ids, fileID{st.Dev, st.Ino})
	case !errors.Is(err, unix.ENOENT):
		return nil, &os.PathError{Op: "stat", Path: o.name, Err: err}
	}
	return ids, nil
}

// publish gives the file its name.
func (o *output) publish() error {
	umask := unix.Umask(0)
	unix.Umask(umask)
	// Some file systems say only now that there is no room. What is replaced is still needed if the machine stops.
	err := o.Chmod(os.FileMode(0o666 &^ umask))
	if err == nil && o.replace {
		err = o.Sync()
	}
	if err = errors.Join(err, o.Close()); err != nil {
		return fmt.Errorf("%s: %w", o.name, err)
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if o.replace {
		flags = 0
	}
	err = unix.Renameat2(unix.AT_FDCWD, o.File.Name(), unix.AT_FDCWD, o.name, flags)
	if errors.Is(err, unix.EINVAL) { // a file system that cannot refuse
		err = os.Rename(o.File.Name(), o.name)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o.name, err)
	}
	o.done = true
	return nil
}

// abandon closes the file, and takes it away if it is not published.
func (o *output) abandon() error {
	if o.done {
		return nil
	}
	err := o.Close()
	if errors.Is(err, os.ErrClosed) {
		err = nil
	}
	return errors.Join(err, os.Remove(o.File.Name()))
}
