package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry"
)

func (p *program) inspectCommand() *cli.Command {
	return &cli.Command{
		Name:        "inspect",
		Usage:       "show an image: manifest, platform, layers, and the superblock of its EROFS layer",
		ArgsUsage:   "REF",
		Description: refHelp,
		Flags:       append([]cli.Flag{jsonFlag()}, imageFlags()...),
		Action:      p.inspect,
	}
}

// inspection is what inspect prints; its JSON form is for programs.
type inspection struct {
	Reference string          `json:"reference"`
	Digest    string          `json:"digest,omitempty"`
	Index     string          `json:"index,omitempty"`
	MediaType string          `json:"mediaType,omitempty"`
	Platform  string          `json:"platform,omitempty"`
	Layers    []inspectedBlob `json:"layers"`
	// Files are what a local image is read from, its devices after it.
	Files []inspectedFile `json:"files,omitempty"`
	// Blob is the blob that mount would take; nil, with Problem saying why,
	// where it would take none.
	Blob    *inspectedBlob `json:"blob,omitempty"`
	Problem string         `json:"problem,omitempty"`
	Erofs   *inspectedFS   `json:"erofs,omitempty"`
}

type inspectedBlob struct {
	Index       int               `json:"index"` // -1: not a layer of the manifest
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	MediaType   string            `json:"mediaType,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type inspectedFile struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
}

type inspectedFS struct {
	BlockSize        int64     `json:"blockSize"`
	Blocks           uint64    `json:"blocks"`
	Inodes           uint64    `json:"inodes"`
	Built            time.Time `json:"built"`
	UUID             string    `json:"uuid"`
	VolumeName       string    `json:"volumeName,omitempty"`
	FeaturesCompat   []string  `json:"featuresCompat"`
	FeaturesIncompat []string  `json:"featuresIncompat"`
	Algorithms       []string  `json:"algorithms"`
	Devices          int       `json:"devices"`
}

func (p *program) inspect(c *cli.Context) error {
	args, err := arguments(c, "REF")
	if err != nil {
		return err
	}
	options, err := p.readSourceOptions(c, args[0], newServerLog(p.stderr).Logger)
	if err != nil {
		return err
	}
	o := &opened{ref: options.ref}
	found, err := p.look(c.Context, o, options)
	if err = errors.Join(err, o.Close()); err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(p.stdout, found)
	}
	return found.print(p.stdout)
}

// look finds the bytes that s names and reads as much of them as the superblock
// needs. An image without a layer to mount is a finding, not an error.
func (p *program) look(ctx context.Context, o *opened, s *sourceOptions) (found *inspection, err error) {
	if s.ref.local() {
		err = o.openFiles(ctx, append([]string{s.ref.path}, s.devices...), 0)
		found = &inspection{Reference: s.ref.String(), Layers: []inspectedBlob{}}
	} else {
		found, err = p.lookAtRegistry(ctx, o, s)
	}
	if err != nil {
		return nil, s.ref.hint(err)
	}
	if found.Problem != "" {
		return found, nil
	}
	for _, f := range o.files {
		found.Files = append(found.Files, inspectedFile{f.State().Path, f.Size()})
	}
	im, err := o.openErofs(ctx, s.memory)
	if err != nil && (errors.Is(err, erofsfmt.ErrNotErofs) || errors.Is(err, erofsfmt.ErrCorrupt) || errors.Is(err, erofsfmt.ErrUnsupported)) {
		found.Problem = o.explain(err).Error()
		return found, nil
	}
	if err != nil {
		return nil, err
	}
	found.Erofs = inspectFS(im.Super())
	return found, nil
}

// lookAtRegistry resolves the reference and opens the layer that mount would take.
func (p *program) lookAtRegistry(ctx context.Context, o *opened, s *sourceOptions) (*inspection, error) {
	var err error
	if o.client, err = registry.New(s.client); err != nil {
		return nil, err
	}
	if o.image, err = o.client.Resolve(ctx, s.ref.registry, s.selector); err != nil {
		return nil, err
	}
	found := &inspection{
		Reference: s.ref.String(), Digest: o.image.Digest.String(), Index: o.image.IndexDigest.String(),
		MediaType: o.image.MediaType, Platform: o.image.Platform, Layers: []inspectedBlob{},
	}
	for _, l := range o.image.Layers {
		found.Layers = append(found.Layers, inspectBlob(l))
	}
	if o.layer, err = o.client.ErofsLayer(ctx, o.image, s.selector); err != nil {
		found.Problem = err.Error()
		return found, nil
	}
	blob := inspectBlob(o.layer)
	found.Blob = &blob
	return found, p.openBlob(ctx, o, s.ref.registry, s, s.client.Logger)
}

func inspectBlob(l registry.Layer) inspectedBlob {
	return inspectedBlob{Index: l.Index, Digest: l.Digest.String(), Size: l.Size, MediaType: l.MediaType, Annotations: l.Annotations}
}

func inspectFS(sb erofsfmt.Superblock) *inspectedFS {
	some := func(names []string) []string { return append([]string{}, names...) } // [] in JSON, not null
	u := sb.UUID
	return &inspectedFS{
		BlockSize: sb.BlockSize(), Blocks: sb.Blocks, Inodes: sb.Inodes, Built: sb.Built().UTC(),
		UUID:       fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16]),
		VolumeName: sb.VolumeName, Devices: len(sb.Devices),
		FeaturesCompat: some(sb.CompatFeatures()), FeaturesIncompat: some(sb.IncompatFeatures()), Algorithms: some(sb.Algorithms()),
	}
}

// print writes the form for people. What comes from a server or an image is
// quoted where it could hold anything.
func (f *inspection) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	line("reference:", "%s", printable(f.Reference))
	for i, file := range f.Files {
		name := "file:"
		if i > 0 {
			name = fmt.Sprintf("device %d:", i)
		}
		line(name, "%s  %d bytes", printable(file.Path), file.Size)
	}
	if f.Digest != "" {
		line("digest:", "%s", f.Digest)
	}
	if f.Index != "" {
		line("index:", "%s", f.Index)
	}
	if f.MediaType != "" {
		line("media type:", "%s", printable(f.MediaType))
	}
	if f.Platform != "" {
		line("platform:", "%s", printable(f.Platform))
	}
	for _, l := range f.Layers {
		mark := ""
		if f.Blob != nil && f.Blob.Index == l.Index {
			mark = "  <- mount"
		}
		line(fmt.Sprintf("layer %d:", l.Index), "%s  %d bytes  %s%s", l.Digest, l.Size, printable(l.MediaType), mark)
	}
	if f.Blob != nil && f.Blob.Index < 0 {
		line("blob:", "%s  %d bytes  <- mount", f.Blob.Digest, f.Blob.Size)
	}
	if f.Problem != "" {
		line("problem:", "%s", f.Problem)
	}
	if fs := f.Erofs; fs != nil {
		line("erofs:", "%d blocks of %d bytes, %d inodes, built %s", fs.Blocks, fs.BlockSize, fs.Inodes, fs.Built.Format(time.RFC3339))
		line("  uuid:", "%s", fs.UUID)
		line("  volume name:", "%s", printable(fs.VolumeName))
		line("  features:", "%s", strings.Join(append(fs.FeaturesCompat, fs.FeaturesIncompat...), " "))
		line("  algorithms:", "%s", strings.Join(fs.Algorithms, " "))
		line("  devices:", "%d", fs.Devices)
	}
	return t.Flush()
}

// printable leaves text as it is, and quotes what could steer a terminal or be
// taken for something quoted.
func printable(s string) string {
	if !utf8.ValidString(s) || strings.HasPrefix(s, `"`) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}
