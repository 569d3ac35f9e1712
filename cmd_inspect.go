package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry"
)

func (p *program) inspectCommand() *cli.Command {
	return &cli.Command{
		Name:        "inspect",
		Usage:       "show an image: manifest, platform, layers, and the superblocks of its EROFS layers",
		ArgsUsage:   "REF",
		Description: refHelp,
		Flags: append([]cli.Flag{jsonFlag(),
			&cli.BoolFlag{Name: "probe", Usage: "say what the registry and its mirrors do: authentication, ranges, redirects, latency, throughput"},
		}, imageFlags()...),
		Action: p.inspect,
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
	// Blob is the blob that mount would take, and Erofs what is in it. Where mount
	// would lay several over each other, they are in Blobs, the lowest first. It
	// takes none where there is a Problem.
	Blob    *inspectedBlob  `json:"blob,omitempty"`
	Erofs   *inspectedFS    `json:"erofs,omitempty"`
	Blobs   []inspectedBlob `json:"blobs,omitempty"`
	Problem string          `json:"problem,omitempty"`
	// Places are the registry and its mirrors, with --probe.
	Places []inspectedPlace `json:"places,omitempty"`
}

type inspectedBlob struct {
	Index       int               `json:"index"` // -1: not a layer of the manifest
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	MediaType   string            `json:"mediaType,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Erofs       *inspectedFS      `json:"erofs,omitempty"` // of one in Blobs
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
	log, err := p.newServerLog(c)
	if err != nil {
		return err
	}
	options, err := p.readSourceOptions(c, args[0], log.Logger)
	if err != nil {
		return err
	}
	look := p.look
	if c.Bool("probe") {
		look = p.lookAndProbe
	}
	o := &opened{ref: options.ref}
	found, err := look(c.Context, o, options)
	err = errors.Join(err, o.Close())
	switch {
	case found == nil:
		return err
	case c.Bool("json"):
		return errors.Join(printJSON(p.stdout, found), err)
	}
	return errors.Join(found.print(p.stdout), err)
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
	return p.lookInside(ctx, o, s, found)
}

// lookInside reads the superblock of what was found.
func (p *program) lookInside(ctx context.Context, o *opened, s *sourceOptions, found *inspection) (*inspection, error) {
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
	layers := im.Layers()
	if found.Blobs == nil {
		found.Erofs = inspectFS(layers[0].Super())
	}
	for i := range found.Blobs {
		found.Blobs[i].Erofs = inspectFS(layers[len(layers)-1-i].Super())
	}
	return found, nil
}

// lookAtRegistry resolves the reference and opens the layers that mount would take.
func (p *program) lookAtRegistry(ctx context.Context, o *opened, s *sourceOptions) (*inspection, error) {
	var err error
	if o.client, err = registry.New(s.client); err != nil {
		return nil, err
	}
	if err = p.resolve(ctx, o, s, s.client.Logger); err != nil {
		return nil, err
	}
	found := &inspection{
		Reference: s.ref.String(), Digest: o.image.Digest.String(), Index: o.image.IndexDigest.String(),
		MediaType: o.image.MediaType, Platform: o.image.Platform, Layers: []inspectedBlob{},
	}
	for _, l := range o.image.Layers {
		found.Layers = append(found.Layers, inspectBlob(l))
	}
	if err = o.chooseLayers(ctx, s); err != nil {
		found.Problem = err.Error()
		return found, nil
	}
	for _, l := range o.layers {
		found.Blobs = append(found.Blobs, inspectBlob(l.Layer))
	}
	if len(found.Blobs) == 1 {
		found.Blob, found.Blobs = &found.Blobs[0], nil
	}
	return found, p.openBlobs(ctx, o, s.ref.registry, s, s.client.Logger)
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
		if f.takes(l.Index) {
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
	if f.Erofs != nil {
		f.Erofs.print(line, "erofs:")
	}
	for _, b := range f.Blobs {
		if b.Erofs != nil {
			b.Erofs.print(line, fmt.Sprintf("erofs of layer %d:", b.Index))
		}
	}
	for _, place := range f.Places {
		for _, l := range place.lines() {
			line(l[0], "%s", l[1])
		}
	}
	return t.Flush()
}

// takes says whether mount takes the layer with this number.
func (f *inspection) takes(index int) bool {
	return f.Blob != nil && f.Blob.Index == index ||
		slices.ContainsFunc(f.Blobs, func(b inspectedBlob) bool { return b.Index == index })
}

func (fs *inspectedFS) print(line func(name, format string, args ...any), name string) {
	line(name, "%d blocks of %d bytes, %d inodes, built %s", fs.Blocks, fs.BlockSize, fs.Inodes, fs.Built.Format(time.RFC3339))
	line("  uuid:", "%s", fs.UUID)
	line("  volume name:", "%s", printable(fs.VolumeName))
	line("  features:", "%s", strings.Join(slices.Concat(fs.FeaturesCompat, fs.FeaturesIncompat), " "))
	line("  algorithms:", "%s", strings.Join(fs.Algorithms, " "))
	line("  devices:", "%d", fs.Devices)
}
