// Command start measures how long it takes until a program of a container image has
// done its work, from the first byte of the image to the last of the program: Python,
// with seven modules that pull in half of its library, of a Debian root that lies in a
// registry at the end of a link of 20 ms and 25 MB/s (see package tests/start). It
// prints a table in Markdown.
//
//	start [-binary bin/erofs-oci] [-images lz4,zstd] [-backends fuse,file] [-rounds 3]
//	      [-ways REGEXP] [-one-core]
//
// The ways to start it are
//
//	skopeo, umoci    the ordinary image: skopeo copy to a layout, umoci unpack
//	one GET, tar -xz its one layer, straight into tar
//	extract          the EROFS image, whole: erofs-oci extract
//	none             a mount that fetches what is asked for, and guesses a little
//	meta             the same with --prefetch=meta
//	all              the same with --prefetch=all
//	profile          the same with --prefetch=FILE, of what a run before has read
//	warm             a mount whose cache directory has all that the run reads
//	offline          the same with --offline, of a cache that has everything
//
// each in directories of its own, until Python has ended: what was fetched by then
// counts, in the background, too. GETs are those of blobs, by who wanted them: a reader,
// readahead or the prefetch; the rest is what the image is verified by. The median of the rounds is printed. Recording, and filling the
// cache for the last two, happens before and is not counted.
//
// It needs root, and the network once, for Debian. -one-core has all of it but the
// registry run on one core.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/erofs-oci/erofs-oci/tests/debian"
	"github.com/erofs-oci/erofs-oci/tests/start"
)

type bench struct {
	binary   string
	images   []string
	backends []string
	rounds   int
	oneCore  bool
	only     *regexp.Regexp // of the ways

	dir  string
	site *start.Site
}

func main() {
	b := &bench{}
	var images, backends, ways string
	flag.StringVar(&b.binary, "binary", "bin/erofs-oci", "the erofs-oci program")
	flag.StringVar(&images, "images", "lz4,zstd", "which EROFS images to start from")
	flag.StringVar(&backends, "backends", "fuse,file", "how to mount them")
	flag.StringVar(&ways, "ways", ".", "start in the ways whose names this `REGEXP` matches")
	flag.IntVar(&b.rounds, "rounds", 3, "the median of so many rounds counts")
	flag.BoolVar(&b.oneCore, "one-core", false, "leave all but the registry one core")
	flag.Parse()
	b.images, b.backends = strings.Split(images, ","), strings.Split(backends, ",")
	err := error(nil)
	if b.only, err = regexp.Compile(ways); err == nil {
		err = b.main(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "start:", err)
		os.Exit(1)
	}
}

func (b *bench) main(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it mounts, and changes the root directory of what it runs")
	}
	if b.rounds < 1 {
		return errors.New("-rounds must be at least 1")
	}
	for _, image := range b.images {
		if _, ok := layouts()[image]; !ok {
			return fmt.Errorf("no image %q; there are lz4 and zstd", image)
		}
	}
	if b.binary, err = filepath.Abs(b.binary); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "erofs-oci-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.site, err = start.NewSite(start.Options{Dir: b.dir, Binary: b.binary, OneCore: b.oneCore}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.site.Close()) }()
	if err := b.push(ctx); err != nil {
		return err
	}
	b.site.SlowDown()
	return b.table(ctx)
}

// tarTag is the ordinary image, of which the others are made.
const tarTag = "tar"

// layouts are how the EROFS images are made.
func layouts() map[string][]string {
	return map[string][]string{
		"lz4":  nil,
		"zstd": {"--compress=zstd", "--cluster-size=64KiB"},
	}
}

// push puts the ordinary image of a Debian with Python into the registry, as others
// make it, and what convert makes of that.
func (b *bench) push(ctx context.Context) (err error) {
	root, err := debian.FetchPython(ctx)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(b.dir, "push-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	layer, layout := filepath.Join(work, "layer.tar"), filepath.Join(work, "layout")
	for _, argv := range [][]string{
		{"tar", "-C", root, "--numeric-owner", "-cf", layer, "."},
		{"umoci", "init", "--layout", layout},
		{"umoci", "new", "--image", layout + ":v1"},
		{"umoci", "raw", "add-layer", "--image", layout + ":v1", layer},
		{"skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "oci:" + layout + ":v1", "docker://" + b.site.Ref(tarTag)},
	} {
		if err := command(exec.CommandContext(ctx, argv[0], argv[1:]...)); err != nil {
			return err
		}
	}
	for _, image := range b.images {
		args := append([]string{"convert", "--quiet", "--erofs-only"}, layouts()[image]...)
		if err := b.site.Run(ctx, append(args, b.site.Ref(tarTag), b.site.Ref(image))...); err != nil {
			return err
		}
	}
	return nil
}

// command runs a program without a word, or returns what it said.
func command(cmd *exec.Cmd) error {
	said, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, said)
	}
	return nil
}
