package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func (p *program) dumpCommand() *cli.Command {
	return &cli.Command{
		Name:      "dump",
		Usage:     "show how an image, or a file of it, is stored",
		ArgsUsage: "REF [PATH]",
		Description: refHelp + "\n" +
			"Without PATH or --nid: the superblock. With one: the inode and its extents. Offsets and lengths are bytes.\n" +
			"A symbolic link at the end of PATH is not followed.",
		Flags: append([]cli.Flag{
			jsonFlag(),
			&cli.StringFlag{Name: "nid", Usage: "show the inode `NID`, by number"},
		}, imageFlags()...),
		Action: p.dump,
	}
}

// dumpedSuper is the JSON form of dump REF.
type dumpedSuper struct {
	BlockSize          int64          `json:"blockSize"`
	Blocks             uint64         `json:"blocks"`
	Inodes             uint64         `json:"inodes"`
	Built              string         `json:"built"`
	UUID               string         `json:"uuid"`
	VolumeName         string         `json:"volumeName"`
	Checksum           *string        `json:"checksum"` // null: there is none
	FeaturesCompat     []string       `json:"featuresCompat"`
	FeaturesIncompat   []string       `json:"featuresIncompat"`
	Algorithms         []string       `json:"algorithms"`
	RootNid            erofsfmt.Nid   `json:"rootNid"`
	PackedNid          *erofsfmt.Nid  `json:"packedNid,omitempty"`
	MetaboxNid         *erofsfmt.Nid  `json:"metaboxNid,omitempty"`
	MetadataOffset     int64          `json:"metadataOffset"` // a nid counts 32 bytes from there
	SharedXattrsOffset int64          `json:"sharedXattrsOffset"`
	XattrPrefixes      []string       `json:"xattrPrefixes"`
	Devices            []dumpedDevice `json:"devices"`
}

type dumpedDevice struct {
	ID     int    `json:"id"`
	Tag    string `json:"tag,omitempty"`
	Length uint64 `json:"length"` // bytes
	Offset uint64 `json:"offset"` // in the image's address space; 0: nowhere
}

// dumpedInode is the JSON form of dump REF PATH.
type dumpedInode struct {
	Nid     erofsfmt.Nid   `json:"nid"`
	Ino     uint64         `json:"ino"`
	Mode    string         `json:"mode"` // octal
	UID     uint32         `json:"uid"`
	GID     uint32         `json:"gid"`
	Nlink   uint32         `json:"nlink"`
	Size    int64          `json:"size"`
	Mtime   string         `json:"mtime"`
	Device  *[2]uint32     `json:"device,omitempty"` // major and minor
	Target  string         `json:"target,omitempty"`
	Offset  int64          `json:"offset"`
	In      string         `json:"in,omitempty"` // what Offset is a byte of, if it is not the image
	Length  int            `json:"length"`       // of the inode: 32 or 64
	XattrSz int            `json:"xattrLength"`
	Xattrs  []string       `json:"xattrs"`
	Layout  string         `json:"layout,omitempty"`
	Unit    int64          `json:"unit,omitempty"`         // bytes of a chunk or an lcluster
	Record  int            `json:"recordLength,omitempty"` // of an extent record
	Flags   []string       `json:"flags"`
	Extents []dumpedExtent `json:"extents"`
}

type dumpedExtent struct {
	Offset int64  `json:"offset"` // in the file
	Length int64  `json:"length"`
	Kind   string `json:"kind"` // hole, stored or encoded
	*dumpedPhysical
}

// dumpedPhysical is there for all extents but holes.
type dumpedPhysical struct {
	Offset    int64  `json:"physicalOffset"`
	Length    int64  `json:"physicalLength"`
	Device    int    `json:"device"`
	In        string `json:"in,omitempty"` // packed inode, metabox
	Algorithm string `json:"algorithm,omitempty"`
	Partial   bool   `json:"partial,omitempty"`
}

func (p *program) dump(c *cli.Context) error {
	names := []string{"REF", "PATH"}
	if c.NArg() == 1 {
		names = names[:1]
	}
	args, err := arguments(c, names...)
	if err != nil {
		return err
	}
	var nid uint64
	if c.IsSet("nid") {
		if len(args) == 2 {
			return usagef("PATH and --nid exclude each other")
		}
		if nid, err = strconv.ParseUint(c.String("nid"), 0, 64); err != nil {
			return usagef("--nid %q: want a number", c.String("nid"))
		}
	}
	return p.withOneLayer(c, args[0], func(ctx context.Context, im *erofsfmt.Image) error {
		var ino erofsfmt.Inode
		var err error
		switch {
		case c.IsSet("nid"):
			ino, err = im.Inode(ctx, erofsfmt.Nid(nid))
		case len(args) == 2:
			ino, err = findPath(ctx, im, args[1], false)
		default:
			d, err := dumpSuper(ctx, im)
			return p.printDump(c, d, err)
		}
		if err != nil {
			return err
		}
		d, err := dumpInode(ctx, im, &ino)
		return p.printDump(c, d, err)
	})
}

// printDump prints what was found, if it was.
func (p *program) printDump(c *cli.Context, d interface{ print(io.Writer) error }, err error) error {
	switch {
	case err != nil:
		return err
	case c.Bool("json"):
		return printJSON(p.stdout, d)
	}
	return d.print(p.stdout)
}

// rfc3339 also writes years that have no form in RFC 3339, which encoding/json
// refuses.
func rfc3339(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// some is what JSON shows as [] and not as null.
func some(names []string) []string { return append([]string{}, names...) }

func dumpSuper(ctx context.Context, im *erofsfmt.Image) (*dumpedSuper, error) {
	sb := im.Super()
	prefixes, err := im.XattrPrefixes(ctx)
	if err != nil {
		return nil, err
	}
	i := inspectFS(sb)
	d := &dumpedSuper{
		BlockSize: i.BlockSize, Blocks: i.Blocks, Inodes: i.Inodes, Built: rfc3339(i.Built), UUID: i.UUID, VolumeName: i.VolumeName,
		FeaturesCompat: i.FeaturesCompat, FeaturesIncompat: i.FeaturesIncompat, Algorithms: i.Algorithms,
		RootNid: sb.RootNid, XattrPrefixes: some(prefixes), Devices: []dumpedDevice{},
		MetadataOffset: int64(sb.MetaBlkaddr) << sb.BlockBits, SharedXattrsOffset: int64(sb.XattrBlkaddr) << sb.BlockBits,
	}
	if slices.Contains(d.FeaturesCompat, "sb_chksum") {
		sum := fmt.Sprintf("%#08x", sb.Checksum)
		d.Checksum = &sum
	}
	if sb.PackedNid != 0 {
		d.PackedNid = &sb.PackedNid
	}
	if slices.Contains(d.FeaturesIncompat, "metabox") {
		d.MetaboxNid = &sb.MetaboxNid
	}
	for i, dev := range sb.Devices {
		d.Devices = append(d.Devices, dumpedDevice{i + 1, dev.Tag, dev.Blocks << sb.BlockBits, dev.Uniaddr << sb.BlockBits})
	}
	return d, nil
}

func dumpInode(ctx context.Context, im *erofsfmt.Image, ino *erofsfmt.Inode) (*dumpedInode, error) {
	s, err := im.Stored(ctx, ino)
	if err != nil {
		return nil, err
	}
	d := &dumpedInode{
		Nid: ino.Nid, Ino: ino.Ino, Mode: fmt.Sprintf("%#o", ino.Mode), UID: ino.UID, GID: ino.GID, Nlink: ino.Nlink, Size: ino.Size,
		Mtime:  rfc3339(time.Unix(ino.Mtime, int64(ino.MtimeNsec))),
		Offset: s.Off, In: s.In, Length: s.Size, XattrSz: s.Xattrs,
		Layout: s.Layout, Unit: s.Unit, Record: s.Record, Flags: some(s.Flags), Extents: []dumpedExtent{},
	}
	switch fileType(ino) {
	case unix.S_IFCHR, unix.S_IFBLK:
		d.Device = &[2]uint32{ino.Major(), ino.Minor()}
	case unix.S_IFLNK:
		if d.Target, err = im.Readlink(ctx, ino); err != nil {
			return nil, err
		}
	}
	xattrs, err := im.Xattrs(ctx, ino)
	if err != nil {
		return nil, err
	}
	d.Xattrs = some(xattrs)
	err = im.Extents(ctx, ino, func(e erofsfmt.Extent) bool {
		x := dumpedExtent{Offset: e.Off, Length: e.Len, Kind: e.Kind}
		if e.Kind != "hole" {
			x.dumpedPhysical = &dumpedPhysical{e.PhysOff, e.PhysLen, e.Device, e.In, e.Algorithm, e.Partial}
		}
		d.Extents = append(d.Extents, x)
		return true
	})
	return d, err
}

// A table is lines of a name and what it is.
type table struct{ *tabwriter.Writer }

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)} }

func (t table) line(name, format string, args ...any) {
	fmt.Fprintf(t, "%s:\t%s\n", name, printable(fmt.Sprintf(format, args...)))
}

func (d *dumpedSuper) print(w io.Writer) error {
	t := newTable(w)
	t.line("blocks", "%d of %d bytes", d.Blocks, d.BlockSize)
	t.line("inodes", "%d", d.Inodes)
	t.line("built", "%s", d.Built)
	t.line("uuid", "%s", d.UUID)
	t.line("volume name", "%s", d.VolumeName)
	sum := "none"
	if d.Checksum != nil {
		sum = *d.Checksum
	}
	t.line("checksum", "%s", sum)
	t.line("compatible features", "%s", strings.Join(d.FeaturesCompat, " "))
	t.line("incompatible features", "%s", strings.Join(d.FeaturesIncompat, " "))
	t.line("algorithms", "%s", strings.Join(d.Algorithms, " "))
	t.line("root", "nid %d", d.RootNid)
	if d.PackedNid != nil {
		t.line("packed inode", "nid %d", *d.PackedNid)
	}
	if d.MetaboxNid != nil {
		t.line("metabox", "nid %d", *d.MetaboxNid)
	}
	t.line("metadata", "at byte %d", d.MetadataOffset)
	t.line("shared xattrs", "at byte %d", d.SharedXattrsOffset)
	for i, prefix := range d.XattrPrefixes {
		t.line(fmt.Sprintf("xattr prefix %d", i), "%s", prefix)
	}
	for _, dev := range d.Devices {
		t.line(fmt.Sprintf("device %d", dev.ID), "%d bytes, at byte %d of the image's addresses %s", dev.Length, dev.Offset, dev.Tag)
	}
	return t.Flush()
}

func (d *dumpedInode) print(w io.Writer) error {
	t := newTable(w)
	t.line("nid", "%d", d.Nid)
	where := ""
	if d.In != "" {
		where = " of the " + d.In
	}
	t.line("inode", "%d bytes at byte %d%s, xattrs %d bytes", d.Length, d.Offset, where, d.XattrSz)
	t.line("mode", "%s", d.Mode)
	t.line("owner", "%d:%d", d.UID, d.GID)
	t.line("links", "%d", d.Nlink)
	t.line("size", "%d", d.Size)
	t.line("mtime", "%s", d.Mtime)
	if d.Device != nil {
		t.line("device", "%d:%d", d.Device[0], d.Device[1])
	}
	if d.Target != "" {
		t.line("target", "%s", d.Target)
	}
	for _, name := range d.Xattrs {
		t.line("xattr", "%s", name)
	}
	if d.Layout != "" {
		t.line("layout", "%s", strings.Join(append([]string{d.Layout}, d.Flags...), " "))
	}
	if d.Unit != 0 {
		t.line("unit", "%d bytes", d.Unit)
	}
	if d.Record != 0 {
		t.line("records", "of %d bytes", d.Record)
	}
	if err := t.Flush(); err != nil || len(d.Extents) == 0 {
		return err
	}
	return printExtents(w, d.Extents)
}

func printExtents(w io.Writer, extents []dumpedExtent) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "OFFSET\tLENGTH\tPHYSICAL\tLENGTH\tIN\tHOW")
	for _, e := range extents {
		if e.dumpedPhysical == nil {
			fmt.Fprintf(t, "%d\t%d\t-\t-\t-\t%s\n", e.Offset, e.Length, e.Kind)
			continue
		}
		x, where, how := e.dumpedPhysical, "image", e.Kind
		switch {
		case x.In != "":
			where = x.In
		case x.Device != 0:
			where = fmt.Sprintf("device %d", x.Device)
		}
		if x.Algorithm != "" {
			how = x.Algorithm
		}
		if x.Partial {
			how += " partial"
		}
		fmt.Fprintf(t, "%d\t%d\t%d\t%d\t%s\t%s\n", e.Offset, e.Length, x.Offset, x.Length, where, how)
	}
	return t.Flush()
}
