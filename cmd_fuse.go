package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/fusefs"
)

// peerName is the program of erofs-utils whose command line the fuse command has.
// Called by that name, we are it.
const peerName = "erofsfuse"

func calledAsPeer(argv []string) bool {
	return len(argv) > 0 && filepath.Base(argv[0]) == peerName
}

// runPeer does what erofsfuse would. It knows of one exit code for failures.
func runPeer(argv []string, stdin io.Reader, stdout, stderr io.Writer) int {
	args := append([]string{"erofs-oci", "fuse"}, argv[1:]...)
	// What goes on in the background is started with these, by our own name.
	os.Args = args
	if run(args, stdin, stdout, stderr) != 0 {
		return exitFailure
	}
	return 0
}

const fuseUsage = `usage: erofs-oci fuse [OPTIONS] IMAGE DIR

Mounts an image in a file, or on a block device, with our own reader. The command
line is that of erofsfuse (erofs-utils): options may also stand after IMAGE and DIR.
Called by the name erofsfuse, erofs-oci is this command.

  -f                 serve in the foreground
  -d                 the same, and say more
  -s                 accepted: nothing that can be seen depends on the number of threads
  -o OPTION[,...]    ro, [no]suid, [no]dev, [no]exec, [no]atime and the like, as in mount(8);
                     allow_other, default_permissions, fsname=NAME, subtype=NAME, max_read=N;
                     and the options of libfuse that are about speed only, which are ignored.
                     The default is nosuid,nodev. Who mounts may read all of the image, unless
                     default_permissions, or allow_other, has the kernel heed modes.
  --device=FILE      the next extra device of the image; may be repeated
  --offset=N         the image begins N bytes into the file
  --dbglevel=N       how much to say, from 0 (errors) to 9; 2 (warnings) if it is not given
  -h, --help         print this
  -V, --version      print the version

The mount is known to erofs-oci list and umount. umount(8) and fusermount3 -u end it,
too.
`

func (p *program) fuseCommand() *cli.Command {
	return &cli.Command{
		Name:               "fuse",
		Usage:              "mount an image in a file, with the command line of erofsfuse",
		ArgsUsage:          "IMAGE DIR",
		CustomHelpTemplate: fuseUsage,
		SkipFlagParsing:    true, // of which options after arguments are no part
		Action:             p.fuse,
	}
}

func (p *program) fuse(c *cli.Context) error {
	call, err := parseFuseCall(c.Args().Slice())
	switch {
	case err != nil:
		return err
	case call.help:
		_, err := io.WriteString(p.stdout, fuseUsage)
		return err
	case call.version:
		_, err := fmt.Fprintln(p.stdout, "erofs-oci", version())
		return err
	}
	m, err := call.request()
	if err != nil {
		return err
	}
	if call.foreground || p.child != nil {
		log, err := p.newLog(logOptions{p.getenv(envLogFormat), cmp.Or(call.level, p.getenv(envLogLevel))})
		if err != nil {
			return err
		}
		return p.serveMount(c.Context, m, log)
	}
	return backend.StartInBackground(c.Context, os.Args[1:], nil)
}

// fuseCall is a command line of erofsfuse.
type fuseCall struct {
	operands      []string // IMAGE and DIR
	options       []string // words of -o
	devices       []string
	offset        int64
	level         string // "" where nothing is said of it
	foreground    bool
	help, version bool
}

// parseFuseCall reads a command line as libfuse's fuse_opt_parse does.
func parseFuseCall(args []string) (*fuseCall, error) {
	c := &fuseCall{}
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--":
			c.operands = append(c.operands, args...)
			args = nil
		case arg == "-o" && len(args) == 0:
			return nil, usagef("option -o needs a value")
		case arg == "-o":
			c.options = append(c.options, splitEscaped(args[0])...)
			args = args[1:]
		case strings.HasPrefix(arg, "-o"):
			c.options = append(c.options, splitEscaped(arg[2:])...)
		case strings.HasPrefix(arg, "-") && arg != "-":
			if err := c.option(arg); err != nil {
				return nil, err
			}
		default:
			c.operands = append(c.operands, arg)
		}
	}
	if !c.help && !c.version && len(c.operands) != 2 {
		return nil, usagef("fuse takes IMAGE and DIR, not %d arguments; see erofs-oci fuse --help", len(c.operands))
	}
	return c, nil
}

func (c *fuseCall) option(arg string) error {
	name, value, valued := strings.Cut(arg, "=")
	switch {
	case arg == "-f":
		c.foreground = true
	case arg == "-d":
		c.foreground, c.level = true, "debug"
	case arg == "-s":
	case arg == "-h", arg == "--help":
		c.help = true
	case arg == "-V", arg == "--version":
		c.version = true
	case name == "--device" && value != "":
		c.devices = append(c.devices, value)
	case name == "--offset" && valued:
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || n < 0 {
			return usagef("--offset=%s: want a number of bytes", value)
		}
		c.offset = n
	case name == "--dbglevel" && valued:
		return c.setLevel(value)
	default:
		return usagef("option %s is not known; see erofs-oci fuse --help", arg)
	}
	return nil
}

// setLevel takes a level of erofsfuse: 0 and 1 are errors, 2 warnings, 3 information.
func (c *fuseCall) setLevel(value string) error {
	n, err := strconv.ParseUint(value, 10, 31)
	if err != nil {
		return usagef("--dbglevel=%s: want a number from 0 to 9", value)
	}
	levels := []string{"error", "error", "warn", "info", "debug"}
	c.level = levels[min(int(n), len(levels)-1)]
	return nil
}

// splitEscaped splits at commas that have no backslash before them.
func splitEscaped(s string) []string {
	var words []string
	var word strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
			word.WriteByte(s[i])
		case s[i] == ',':
			words = append(words, word.String())
			word.Reset()
		default:
			word.WriteByte(s[i])
		}
	}
	return append(words, word.String())
}

// request is the mount that is called for.
func (c *fuseCall) request() (*mountRequest, error) {
	m := &mountRequest{
		backend: backend.FUSE, name: peerName,
		fuse:   fusefs.Backend{Subtype: peerName, Unchecked: true},
		source: &sourceOptions{ref: imageRef{typed: c.operands[0]}, offset: c.offset},
	}
	words := []string{"nosuid", "nodev"}
	for _, word := range c.options {
		rest, err := c.mountOption(m, word)
		if err != nil {
			return nil, err
		}
		words = append(words, rest)
	}
	var err error
	if m.flags, err = backend.ParseMountOptions(words); err != nil {
		return nil, errUsage{err}
	}
	if m.source.ref.path, err = filepath.Abs(c.operands[0]); err != nil {
		return nil, err
	}
	for _, d := range c.devices {
		abs, err := filepath.Abs(d)
		if err != nil {
			return nil, err
		}
		m.source.devices = append(m.source.devices, abs)
	}
	m.dir, err = backend.CheckTarget(c.operands[1])
	return m, err
}

// mountOption does what a word of -o asks for, and returns what is left of it to
// those who know the words of mount(8).
func (c *fuseCall) mountOption(m *mountRequest, word string) (rest string, err error) {
	name, value, valued := strings.Cut(word, "=")
	switch {
	case name == "fsname" && value != "":
		m.name = value
	case name == "subtype" && value != "":
		m.fuse.Subtype = value
	case name == "max_read" && valued:
		n, err := strconv.ParseUint(value, 10, 31)
		if err != nil {
			return "", usagef("-o %s: want a number of bytes", word)
		}
		m.fuse.MaxRead = int(n)
	case word == "default_permissions":
		m.fuse.Unchecked = false
	case word == "debug":
		c.foreground, c.level = true, "debug"
	case name == "uid", name == "gid", name == "umask", name == "allow_root", name == "auto_unmount":
		return "", usagef("-o %s is not supported: it would be ignored", word)
	case word == "rw", slices.Contains(speedOptions(), name):
		// libfuse takes rw of a file system that cannot be written to.
	case strings.Contains(word, ","):
		return "", usagef("-o %q is not known", word)
	default:
		return word, nil
	}
	return "", nil
}

// speedOptions are those of libfuse 3 that change nothing that can be seen: an
// image does not change, and what the kernel keeps of it is valid for ever.
func speedOptions() []string {
	return []string{
		"kernel_cache", "auto_cache", "noauto_cache", "direct_io", "entry_timeout", "attr_timeout", "negative_timeout", "ac_attr_timeout",
		"noforget", "remember", "clone_fd", "max_idle_threads", "max_threads", "max_background", "congestion_threshold",
		"max_readahead", "max_write", "async_read", "sync_read", "splice_read", "no_splice_read", "splice_write",
		"no_splice_write", "splice_move", "no_splice_move", "use_ino", "readdir_ino", "hard_remove", "intr", "intr_signal",
		"async", "sync", "dirsync",
	}
}
