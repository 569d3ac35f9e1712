package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/registry"
)

func (p *program) convertCommand() *cli.Command {
	flags := []cli.Flag{
		&cli.BoolFlag{Name: "squash", Usage: "make one layer of all, not one of each"},
		&cli.StringFlag{Name: "platform", Usage: "convert `OS/ARCH[/VARIANT]` of an image index (default: this machine's)"},
		&cli.BoolFlag{Name: "all-platforms", Usage: "convert every platform of an image index"},
		&cli.BoolFlag{Name: "erofs-only", Usage: "do not keep the tar image beside the EROFS one"},
	}
	return &cli.Command{
		Name:      "convert",
		Usage:     "make an EROFS image of a container image, in a registry",
		ArgsUsage: "SOURCE DEST",
		Description: "SOURCE is an image, [docker://]HOST/REPOSITORY[:TAG][@DIGEST], oci:DIR[:NAME],\n" +
			"oci-archive:FILE[:NAME] or docker-archive:FILE[:NAME]. " + destHelp +
			"Each tar layer becomes an EROFS layer, to be mounted over each other. DEST becomes an index\n" +
			"with the tar image first, for those who do not know EROFS, and the EROFS image after it.\n",
		// An image for users is never without its data.
		Flags:  append(append(append(flags, without(buildFlags(), "metadata-only")...), publishFlags()...), append(accessFlags(), logFlags()...)...),
		Action: p.convert,
	}
}

func (p *program) convert(c *cli.Context) (err error) {
	begun := time.Now()
	args, err := arguments(c, "SOURCE", "DEST")
	if err != nil {
		return err
	}
	source, err := parsePlace(args[0])
	if err != nil {
		return err
	}
	dest, err := parseDest(args[1])
	if err != nil {
		return err
	}
	v, err := p.newConverter(c, source, dest)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	images, err := v.images(c.Context, c.Bool("all-platforms"))
	if err != nil {
		return err
	}
	// Not before: it makes what is missing.
	if v.sink, err = openSink(dest, v.from.client); err != nil {
		return err
	}
	target := ""
	if v.alone && len(images) == 1 {
		target = dest.target() // a manifest needs no index
	}
	var all []*converted
	var last ocispec.Descriptor
	for _, im := range images {
		made, err := v.image(c.Context, im, target)
		if err != nil {
			return fmt.Errorf("%s: %w", im.Digest, err)
		}
		all, last = append(all, made), made.erofs
	}
	if target == "" {
		if last, err = v.putIndex(c.Context, dest.target(), all, images[0].IndexAnnotations()); err != nil {
			return err
		}
	}
	if err := v.sayReferrers(c.Context, source, images); err != nil {
		return err
	}
	v.from.steps.close()
	return p.reportConvert(dest, all, last.Digest, time.Since(begun), v.how.quiet)
}

func (p *program) newConverter(c *cli.Context, source, dest place) (v *converter, err error) {
	v = &converter{squash: c.Bool("squash"), alone: c.Bool("erofs-only")}
	if c.Bool("all-platforms") && c.String("platform") != "" {
		return nil, usagef("--platform and --all-platforms exclude each other")
	}
	if v.publishing, err = readPublishing(c); err != nil {
		return nil, err
	}
	if v.how, err = readBuildOptions(c); err != nil {
		return nil, err
	}
	if err := p.checkHosts(c, source, dest); err != nil {
		return nil, err
	}
	if v.from, err = p.treeOptions(c, v.how); err != nil {
		return nil, err
	}
	if source.kind == inRegistry && dest.kind == inRegistry && source.ref.Host == dest.ref.Host && source.ref.Repository != dest.ref.Repository {
		v.put.MountFrom = []string{source.ref.Repository}
	}
	if v.src, err = openStore(source, v.from.client); err != nil {
		v.from.steps.close()
		return nil, err
	}
	return v, nil
}

// checkHosts refuses what is said of one registry where there are two: name and password would be sent to both, and
// both would be spoken to without protection.
func (p *program) checkHosts(c *cli.Context, a, b place) error {
	if a.kind != inRegistry || b.kind != inRegistry || a.ref.Host == b.ref.Host {
		return nil
	}
	if c.IsSet("username") || c.IsSet("creds-stdin") || p.getenv("EROFS_OCI_USERNAME") != "" {
		return usagef("the name and password given are for one registry, and %s and %s are two; log in to both (podman login, docker login) or use --authfile", a.ref.Host, b.ref.Host)
	}
	if registry.IsLoopback(a.ref.Host) && registry.IsLoopback(b.ref.Host) {
		return nil
	}
	if c.Bool("plain-http") || !c.Bool("tls-verify") {
		return usagef("--plain-http and --tls-verify=false are for one registry, and %s and %s are two; say it of one of them in registries.conf (insecure = true)", a.ref.Host, b.ref.Host)
	}
	return nil
}

// sayLeftOut says what of an index is not carried over.
func (v *converter) sayLeftOut(im *registry.Image) {
	var index ocispec.Index
	if json.Unmarshal(im.Index.Raw, &index) != nil {
		return // it was read before
	}
	others := 0
	for _, e := range index.Manifests {
		if e.Digest != im.Digest && (e.Platform == nil || !slices.Contains(e.Platform.OSFeatures, registry.FeatureErofs)) {
			others++
		}
	}
	if others > 0 {
		v.from.steps.say("%d other images of the index (platforms, attestations) are not carried over; --all-platforms converts every platform", others)
	}
}

func (v *converter) close() error {
	v.from.steps.close()
	err := v.src.Close()
	if v.sink != nil {
		err = errors.Join(err, v.sink.Close())
	}
	return err
}

// images are those to be converted.
func (v *converter) images(ctx context.Context, all bool) ([]*registry.Image, error) {
	if !all {
		im, err := registry.ResolveIn(ctx, v.src.Store, "", v.from.selector)
		if err == nil && im.Index != nil {
			v.sayLeftOut(im)
		}
		return []*registry.Image{im}, err
	}
	top, err := v.src.Manifest(ctx, "")
	if err != nil {
		return nil, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(top.Raw, &index); err != nil {
		return nil, fmt.Errorf("%s: %w", top.Digest, err)
	}
	if len(index.Manifests) == 0 {
		return nil, fmt.Errorf("%s is one image, not an index; leave --all-platforms out", top.Digest)
	}
	var list []*registry.Image
	for _, e := range index.Manifests {
		switch {
		case e.Platform == nil || e.Platform.OS == "unknown" || e.Platform.OS == "":
			v.from.steps.warn("%s is for no platform (an attestation, say) and is not carried over", e.Digest)
			continue
		case slices.Contains(e.Platform.OSFeatures, registry.FeatureErofs):
			continue // made from one of the others
		}
		im, err := registry.ResolveIn(ctx, v.src.Store, e.Digest.String(), registry.Selector{Prefer: registry.PreferTar})
		if err != nil {
			return nil, err
		}
		im.Index, im.IndexDigest, im.Entry = &top, top.Digest, &e
		list = append(list, im)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: the index has no tar image", top.Digest)
	}
	return list, nil
}

// sayReferrers says what belongs to the source's digests, and so not to what was made of it.
func (v *converter) sayReferrers(ctx context.Context, source place, images []*registry.Image) error {
	if source.kind != inRegistry {
		return nil
	}
	seen := map[digest.Digest]bool{}
	for _, im := range images {
		for _, d := range []digest.Digest{im.IndexDigest, im.Digest} {
			if d == "" || seen[d] {
				continue
			}
			seen[d] = true
			list, err := v.src.client.Referrers(ctx, source.ref, d)
			if err != nil {
				v.from.steps.warn("whether signatures or the like refer to %s could not be found out: %v", d, err)
				continue
			}
			for _, r := range list {
				kind := r.ArtifactType
				if kind == "" {
					kind = r.MediaType
				}
				v.from.steps.warn("%s refers to %s and is not carried over: it is for the source's digest (%s)", r.Digest, d, kind)
			}
		}
	}
	return nil
}

// reportConvert prints a line for each image, and the closing line.
func (p *program) reportConvert(dest place, all []*converted, d digest.Digest, took time.Duration, quiet bool) error {
	if quiet {
		_, err := fmt.Fprintln(p.stdout, d)
		return err
	}
	for _, m := range all {
		name := m.platform.OS + "/" + m.platform.Architecture
		if m.platform.Variant != "" {
			name += "/" + m.platform.Variant
		}
		if _, err := fmt.Fprintf(p.stdout, "%s: %d layers, %s as tar, %s as EROFS (%.0f %%), %s of files; %s\n", name, m.layers,
			sizeText(m.tarSize), sizeText(m.size), 100*float64(m.size)/float64(max(m.tarSize, 1)), sizeText(m.content), m.erofs.Digest); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(p.stdout, "%s: %.1f s; %s\n", dest.typed, took.Seconds(), d)
	return err
}
