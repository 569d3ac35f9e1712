package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry"
)

const destHelp = "DEST is [docker://]HOST/REPOSITORY[:TAG], or oci:DIR[:NAME] for a directory of the OCI image layout.\n"

func (p *program) pushCommand() *cli.Command {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "platform", Usage: "say that the image is for `OS/ARCH[/VARIANT]` (default: this machine's)"},
		&cli.StringFlag{Name: "config", Usage: "take entry point, environment and the like from `FILE`, an OCI image configuration (JSON)"},
		&cli.StringSliceFlag{Name: "annotation", Usage: "annotate the manifest with `NAME=VALUE`"},
		&cli.StringFlag{Name: "tmp", EnvVars: []string{"TMPDIR"}, Usage: "keep the dm-verity tree and the chunk index in `DIR` meanwhile", DefaultText: "$TMPDIR, or /var/tmp"},
		&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "say nothing but the digest at the end"},
	}
	return &cli.Command{
		Name:      "push",
		Usage:     "push an EROFS image as a container image of one layer",
		ArgsUsage: "FILE DEST",
		Description: "FILE is the path of an EROFS image. " + destHelp +
			"What the registry has already is not sent again.\n",
		Flags:  append(append(flags, publishFlags()...), append(accessFlags(), logFlags()...)...),
		Action: p.push,
	}
}

func (p *program) push(c *cli.Context) (err error) {
	begun := time.Now()
	args, err := arguments(c, "FILE", "DEST")
	if err != nil {
		return err
	}
	u, err := p.newPusher(c, args[1])
	if err != nil {
		return err
	}
	defer u.from.steps.close()
	f, err := openImageFile(c.Context, args[0])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	sink, err := openSink(u.dest, u.from.client)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sink.Close()) }()
	blob, err := u.fileBlob(c.Context, f, u.from)
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	defer func() { err = errors.Join(err, blob.Close()) }()
	put, err := u.image(c.Context, sink, blob)
	if err != nil {
		return err
	}
	u.from.steps.close()
	return p.reportPush(u.dest, put.Digest, fmt.Sprintf("1 layer of %s; %.1f s", sizeText(blob.desc.Size), time.Since(begun).Seconds()), u.how.quiet)
}

// A pusher makes a container image of an EROFS image.
type pusher struct {
	*publishing
	how         *buildOptions
	from        treeOptions
	dest        place
	config      document
	annotations map[string]string
}

// newPusher reads all of the command line but the file.
func (p *program) newPusher(c *cli.Context, dest string) (u *pusher, err error) {
	u = &pusher{}
	if u.publishing, err = readPublishing(c); err != nil {
		return nil, err
	}
	if u.how, err = readScratch(c); err != nil {
		return nil, err
	}
	if u.dest, err = parseDest(dest); err != nil {
		return nil, err
	}
	if u.annotations, err = parseAnnotations(c.StringSlice("annotation")); err != nil {
		return nil, err
	}
	if u.config, err = readConfig(c.String("config"), c.String("platform")); err != nil {
		return nil, err
	}
	u.from, err = p.treeOptions(c, u.how)
	return u, err
}

// image sends a layer, and what makes it an image.
func (u *pusher) image(ctx context.Context, sink registry.Sink, blob *layerBlob) (ocispec.Descriptor, error) {
	if err := u.send(ctx, sink, "push layer", blob.desc, blob.content, u.from.steps); err != nil {
		return ocispec.Descriptor{}, err
	}
	layers := []ocispec.Descriptor{blob.desc}
	if err := changeHistory(u.config, len(layers), false); err != nil {
		return ocispec.Descriptor{}, err
	}
	raw, err := erofsConfig(u.config, layers)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return u.putImage(ctx, sink, u.dest.target(), raw, layers, u.annotations, u.from.steps)
}

// reportPush prints the closing line.
func (p *program) reportPush(dest place, d digest.Digest, what string, quiet bool) error {
	var err error
	if quiet {
		_, err = fmt.Fprintln(p.stdout, d)
	} else {
		_, err = fmt.Fprintf(p.stdout, "%s: %s; %s\n", dest.typed, what, d)
	}
	return err
}

// openImageFile opens an EROFS image, and makes sure that it is one.
func openImageFile(ctx context.Context, path string) (*backend.File, error) {
	f, err := backend.OpenFile(strings.TrimPrefix(path, fileScheme))
	if err != nil {
		return nil, err
	}
	im, err := erofsfmt.Open(ctx, f)
	if err == nil && len(im.Super().Devices) > 0 {
		err = errors.New("keeps data on extra devices; only images of one file can be pushed")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return f, nil
}

// fileBlob makes a layer of an image in a file.
func (o *publishing) fileBlob(ctx context.Context, f *backend.File, from treeOptions) (*layerBlob, error) {
	image := sourceAt{ctx, f}
	step := from.steps.begin("hash", f.Size())
	known, err := digest.FromReader(io.TeeReader(ctxReader{ctx, io.NewSectionReader(image, 0, f.Size())}, step))
	step.end(err)
	if err != nil {
		return nil, err
	}
	return o.layerBlob(ctx, image, f.Size(), known, from.scratch)
}

// A sourceAt is a source for who reads with io.ReaderAt.
type sourceAt struct {
	ctx context.Context
	backend.Source
}

func (s sourceAt) ReadAt(p []byte, off int64) (int, error) {
	rest := s.Size() - off
	if rest <= 0 {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), rest))
	if err := s.Source.ReadAt(s.ctx, p[:n], off); err != nil {
		return 0, err
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// parseDest reads the name of a place to write to.
func parseDest(typed string) (place, error) {
	at, err := parsePlace(typed)
	switch {
	case err != nil:
		return at, err
	case at.kind != inRegistry && at.kind != inLayout:
		return at, usagef("%s: images go to a registry or to oci:DIR", typed)
	case at.kind == inRegistry && at.ref.Digest != "":
		return at, usagef("%s: a digest follows from what is pushed; give a tag", typed)
	}
	return at, nil
}

// target is the name that a manifest gets.
func (p place) target() string {
	if p.kind == inRegistry {
		return p.ref.Tag
	}
	return p.name
}

// An openedSink is a sink with what has to be closed after it.
type openedSink struct {
	registry.Sink
	close func() error
}

func (s *openedSink) Close() error { return s.close() }

func openSink(at place, o registry.Options) (*openedSink, error) {
	if at.kind == inLayout {
		l, err := registry.CreateLayout(at.path, at.name)
		if err != nil {
			return nil, err
		}
		return &openedSink{l, l.Close}, nil
	}
	c, err := registry.New(o)
	if err != nil {
		return nil, err
	}
	return &openedSink{c.Repository(at.ref), c.Close}, nil
}

func parseAnnotations(list []string) (map[string]string, error) {
	all := make(map[string]string, len(list))
	for _, a := range list {
		name, value, ok := strings.Cut(a, "=")
		if !ok || name == "" {
			return nil, usagef("--annotation %q: want NAME=VALUE", a)
		}
		all[name] = value
	}
	return all, nil
}

// maxConfig bounds an image's configuration.
const maxConfig = 8 << 20

// readConfig reads an image's configuration, or begins one, for a platform.
func readConfig(file, name string) (document, error) {
	config := document{}
	if file != "" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("--config: %w", err)
		}
		defer f.Close()
		d := json.NewDecoder(io.LimitReader(f, maxConfig))
		if err := d.Decode(&config); err != nil {
			return nil, fmt.Errorf("--config %s: not a JSON object: %w", file, err)
		}
		if config == nil {
			return nil, fmt.Errorf("--config %s: not a JSON object", file)
		}
	}
	if file != "" && name == "" && config["architecture"] != nil && config["os"] != nil {
		return config, nil
	}
	platform, err := registry.ParsePlatform(name)
	if err != nil {
		return nil, errUsage{err}
	}
	err = errors.Join(config.set("os", platform.OS), config.set("architecture", platform.Architecture))
	if delete(config, "variant"); err == nil && platform.Variant != "" {
		err = config.set("variant", platform.Variant)
	}
	return config, err
}
