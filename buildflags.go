package main

import (
	"encoding/hex"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/erofsfmt/mkerofs"
)

// buildFlags say how an image is made of a tree.
func buildFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "compress", Aliases: []string{"z"}, Value: "lz4", Usage: "compress files by `ALGORITHM[,LEVEL]`: lz4 (Linux 5.4), lz4hc, zstd (Linux 6.10), deflate (Linux 6.6), or none"},
		&cli.StringFlag{Name: "cluster-size", Aliases: []string{"C"}, Usage: "compress up to `SIZE` at a time; larger makes images smaller, and a small read cost more (up to 1MiB; more than a block takes Linux 5.13)", DefaultText: "a block"},
		&cli.BoolFlag{Name: "tail-packing", Usage: "put the compressed end of a file behind its inode (Linux 5.17)"},
		&cli.BoolFlag{Name: "fragments", Usage: "compress the ends of files, and small files, together (Linux 6.1)"},
		&cli.BoolFlag{Name: "dedupe", Usage: "store files with the same content once (Linux 6.1)"},
		&cli.StringFlag{Name: "chunk-size", Usage: "do not compress; cut files into chunks of `SIZE`, of which those with the same content are stored once (Linux 5.15)"},
		&cli.StringFlag{Name: "inline-max", Usage: "put the end of an uncompressed file, what does not fill a block, behind its inode if it has at most `SIZE`; 0 makes the image larger, and listing it read less", DefaultText: "half a block"},
		&cli.StringFlag{Name: "block-size", Value: "4KiB", Usage: "make blocks of `SIZE`: 512 to 64KiB; Linux mounts those up to its page size"},
		&cli.StringFlag{Name: "label", Aliases: []string{"L"}, Usage: "call the volume `NAME` (at most 16 bytes)"},
		&cli.StringFlag{Name: "uuid", Aliases: []string{"U"}, Usage: "give the volume this `UUID`", DefaultText: "derived from all that is in the image"},
		&cli.Int64Flag{Name: "source-date-epoch", EnvVars: []string{"SOURCE_DATE_EPOCH"}, Usage: "take times later than `SECONDS` since 1970 for that", DefaultText: "keep all times"},
		&cli.StringFlag{Name: "order", Usage: "put the files that `FILE` names, a path in each line, first and in that order"},
		&cli.StringSliceFlag{Name: "xattr-prefix", Usage: "store this beginning of names of extended attributes once: `NAME.` (Linux 6.4)"},
		&cli.BoolFlag{Name: "metadata-only", Usage: "leave the data of all files out: they have their sizes and read as zeros"},
		&cli.IntFlag{Name: "workers", Usage: "compress with `N` goroutines, 1 to 8; the image is the same", DefaultText: "one for each processor"},
		&cli.StringFlag{Name: "max-size", Usage: "refuse a tree whose files have more than `SIZE` together", DefaultText: "no limit"},
		&cli.StringFlag{Name: "tmp", EnvVars: []string{"TMPDIR"}, Usage: "keep temporary files in `DIR`: of a container image as much as its layers have uncompressed, and as much as the image to be", DefaultText: "$TMPDIR, or /var/tmp"},
		&cli.StringFlag{Name: "tmp-limit", Usage: "keep at most `SIZE` of layers there, and at most as much of what they are made of: the data of archives that cannot be read again, and compressed data", DefaultText: "no limit"},
		&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "say nothing but the digest at the end"},
	}
}

// buildOptions are what the buildFlags say.
type buildOptions struct {
	options  mkerofs.Options
	maxBytes int64
	tmpLimit int64
	tmp      string
	quiet    bool
}

// readScratch reads those of them that say where large files go, and whether to be quiet.
func readScratch(c *cli.Context) (*buildOptions, error) {
	how := &buildOptions{quiet: c.Bool("quiet"), tmp: tempDir(c.String("tmp"))}
	if limit := c.String("tmp-limit"); limit != "" {
		var err error
		if how.tmpLimit, err = parseSize("tmp-limit", limit); err != nil {
			return nil, err
		}
	}
	return how, nil
}

func readBuildOptions(c *cli.Context) (*buildOptions, error) {
	how, err := readScratch(c)
	if err != nil {
		return nil, err
	}
	o := &how.options
	var size struct{ block, inline, chunk, cluster int64 }
	for flag, to := range map[string]*int64{
		"block-size": &size.block, "inline-max": &size.inline, "chunk-size": &size.chunk, "cluster-size": &size.cluster,
		"max-size": &how.maxBytes,
	} {
		if c.String(flag) == "" {
			continue
		}
		n, err := parseSize(flag, c.String(flag))
		if err != nil {
			return nil, err
		}
		*to = n
	}
	if !c.IsSet("inline-max") && !c.Bool("metadata-only") {
		size.inline = size.block / 2 // a little larger than with a block, and listed with half as many requests
	}
	o.BlockSize, o.InlineMax, o.ChunkSize = int(size.block), int(size.inline), int(size.chunk)
	o.Label, o.XattrPrefixes, o.TempDir = c.String("label"), c.StringSlice("xattr-prefix"), how.tmp
	o.Workers, o.MetadataOnly = c.Int("workers"), c.Bool("metadata-only")
	if c.IsSet("source-date-epoch") {
		o.SourceDateEpoch = time.Unix(c.Int64("source-date-epoch"), 0)
	}
	if err := how.readCompression(c, int(size.cluster)); err != nil {
		return nil, err
	}
	if s := c.String("uuid"); s != "" {
		raw, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
		if err != nil || len(raw) != len(o.UUID) {
			return nil, usagef("--uuid %q: want 32 hexadecimal digits", s)
		}
		copy(o.UUID[:], raw)
	}
	if file := c.String("order"); file != "" {
		if o.Order, err = readOrder(file); err != nil {
			return nil, err
		}
	}
	// The builder knows what goes together.
	if _, err := mkerofs.New(nil, *o); err != nil {
		return nil, errUsage{err}
	}
	return how, nil
}

func (how *buildOptions) readCompression(c *cli.Context, cluster int) error {
	z := &how.options.Compression
	name, level, leveled := strings.Cut(c.String("compress"), ",")
	if leveled {
		n, err := strconv.Atoi(level)
		if err != nil || n < 1 {
			return usagef("--compress %q: want ALGORITHM or ALGORITHM,LEVEL", c.String("compress"))
		}
		z.Level = n
	}
	z.Algorithm = mkerofs.Algorithm(name)
	z.ClusterSize, z.TailPacking, z.Fragments, z.Dedupe = cluster, c.Bool("tail-packing"), c.Bool("fragments"), c.Bool("dedupe")
	// What excludes compression does so without being asked to.
	if name == "none" || name == "" || (how.options.ChunkSize > 0 || how.options.MetadataOnly) && !c.IsSet("compress") {
		z.Algorithm = mkerofs.Uncompressed
	}
	return nil
}

// maxOrder bounds a file with an order: a path in each line.
const maxOrder = 256 << 20

// readOrder reads the paths of a profile. Lines that are empty or begin with # are none.
func readOrder(file string) ([]string, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("--order: %w", err)
	}
	if st.Size() > maxOrder {
		return nil, fmt.Errorf("--order %s: has more than %d bytes", file, maxOrder)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--order: %w", err)
	}
	var list []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimPrefix(strings.TrimPrefix(strings.TrimRight(line, "\r\n"), "."), "/")
		if line != "" && !strings.HasPrefix(line, "#") {
			list = append(list, line)
		}
	}
	return list, nil
}

// tempDir is where large temporary files go: where the user says, else where they last longer than in a memory.
func tempDir(flag string) string {
	const large = "/var/tmp"
	if flag != "" {
		return flag
	}
	if st, err := os.Stat(large); err == nil && st.IsDir() {
		return large
	}
	return os.TempDir()
}

// newBuilder begins an image in w.
func (how *buildOptions) newBuilder(w *os.File, progress func(files, bytes int64)) (*mkerofs.Builder, error) {
	o := how.options
	o.Progress, o.TempLimit = progress, how.tmpLimit
	return mkerofs.New(w, o)
}
