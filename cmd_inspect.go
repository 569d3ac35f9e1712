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

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
	"github.com/erofs-oci/erofs-oci/registry"
)

func (p *program) inspectCommand() *cli.Command {
	return &cli.Command{
		Name:      "inspect",
		Usage:     "show an image: manifest, platform, layers, and the superblock of its EROFS layer",
		ArgsUsage: "REF",
		Flags:     append([]cli.Flag{jsonFlag()}, sourceFlags()...),
		Action:    p.inspect,
	}
}

// inspection is what inspect prints; its JSON form is for programs.
type inspection struct {
	Reference string          `json:"reference"`
	Digest    string          `json:"digest"`
	Index     string          `json:"index,omitempty"`
	MediaType string          `json:"mediaType"`
	Platform  string          `json:"platform,omitempty"`
	Layers    []inspectedBlob `json:"layers"`
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
	ref, err := registry.ParseReference(args[0])
	if err != nil {
		return err
	}
	log := newServerLog(p.stderr).Logger
	options, err := p.readSourceOptions(c, log)
	if err != nil {
		return err
	}
	o := &opened{}
	if o.client, err = registry.New(options.client); err != nil {
		return err
	}
	found, err := p.look(c.Context, o, ref, options)
	if err = errors.Join(err, o.Close()); err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(p.stdout, found)
	}
	return found.print(p.stdout)
}

// look resolves ref and reads as much of the chosen layer as its superblock
// needs. An image without a layer to mount is a finding, not an error.
func (p *program) look(ctx context.Context, o *opened, ref registry.Reference, s *sourceOptions) (*inspection, error) {
	var err error
	if o.image, err = o.client.Resolve(ctx, ref, s.selector); err != nil {
		return nil, err
	}
	found := &inspection{
		Reference: ref.String(), Digest: o.image.Digest.String(), Index: o.image.IndexDigest.String(),
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
	if err := p.openBlob(o, ref, s, s.client.Logger); err != nil {
		return nil, err
	}
	im, err := erofsfmt.Open(ctx, o.blob)
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
	line("reference:", "%s", f.Reference)
	line("digest:", "%s", f.Digest)
	if f.Index != "" {
		line("index:", "%s", f.Index)
	}
	line("media type:", "%s", printable(f.MediaType))
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

// printable leaves text as it is, and quotes what could steer a terminal.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}
