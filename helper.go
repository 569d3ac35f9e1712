package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/erofs-oci/erofs-oci/backend"
)

// helperName is the name under which mount(8) looks for this program, to mount
// what fstab(5) and -t call erofs-oci.
const helperName = "mount.erofs-oci"

// Exit codes of mount(8) and of what helps it.
const (
	helperUsage   = 1
	helperFailure = 32
)

// calledAsHelper tells whether mount(8) called: argv[0] is the only hint.
func calledAsHelper(argv []string) bool {
	return len(argv) > 0 && filepath.Base(argv[0]) == helperName
}

// runHelper does what mount(8) asks for, and returns an exit code for it.
func runHelper(argv []string, stdin io.Reader, stdout, stderr io.Writer) int {
	args, err := helperArgs(argv)
	if err != nil {
		fmt.Fprintln(stderr, "erofs-oci:", oneLine(err))
		return helperUsage
	}
	if args == nil {
		return 0
	}
	// What goes on in the background is started with these, by our own name.
	os.Args = args
	return helperExit(run(args, stdin, stdout, stderr))
}

// helperExit makes an exit code for mount(8) of one of ours.
func helperExit(code int) int {
	switch code {
	case 0:
		return 0
	case exitUsage:
		return helperUsage
	}
	return helperFailure
}

// helperArgs makes a command line of ours out of mount(8)'s:
//
//	mount.erofs-oci REF DIR [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]
//
// It is nil where nothing is to be done (-f).
func helperArgs(argv []string) ([]string, error) {
	call, err := parseHelperCall(argv[1:])
	if err != nil {
		return nil, err
	}
	flags, err := helperFlags(call.options, call.sloppy)
	if err != nil || call.fake {
		return nil, err
	}
	return slices.Concat([]string{"erofs-oci", "mount"}, flags, call.operands), nil
}

// helperCall is what mount(8) said.
type helperCall struct {
	operands     []string // REF and DIR
	options      []string // words of -o
	sloppy, fake bool
}

func parseHelperCall(args []string) (helperCall, error) {
	var c helperCall
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if !strings.HasPrefix(arg, "-") || arg == "-" {
			c.operands = append(c.operands, arg)
			continue
		}
		// Letters may stand together; the last may have a value.
		for i, letter := range arg[1:] {
			if strings.ContainsRune("oNt", letter) {
				value := arg[1+i+1:]
				if value == "" {
					if len(args) == 0 {
						return c, usagef("option -%c needs a value", letter)
					}
					value, args = args[0], args[1:]
				}
				if err := c.set(letter, value); err != nil {
					return c, err
				}
				break
			}
			if err := c.set(letter, ""); err != nil {
				return c, err
			}
		}
	}
	if len(c.operands) != 2 {
		return c, usagef("usage: %s REF DIR [-sfnv] [-o OPTIONS]; it is called by mount -t erofs-oci", helperName)
	}
	return c, nil
}

func (c *helperCall) set(letter rune, value string) error {
	switch letter {
	case 'o':
		words, err := splitOptions(value)
		c.options = append(c.options, words...)
		return err
	case 's':
		c.sloppy = true
	case 'f':
		c.fake = true
	case 'n', 'v', 't':
		// There is no /etc/mtab, nothing more to say, and one type.
	case 'N':
		return usagef("-N is not supported; nsenter --mount=%s mount … does it", value)
	default:
		return usagef("option -%c is not known", letter)
	}
	return nil
}

// splitOptions splits at commas that are not within double quotes, and takes the
// quotes away, as mount(8) describes for its -o.
func splitOptions(s string) ([]string, error) {
	var words []string
	var word strings.Builder
	quoted := false
	for _, r := range s {
		switch {
		case r == '"':
			quoted = !quoted
		case r == ',' && !quoted:
			words = append(words, word.String())
			word.Reset()
		default:
			word.WriteRune(r)
		}
	}
	if quoted {
		return nil, usagef("-o: a quotation mark has no partner")
	}
	return append(words, word.String()), nil
}

// helperKeys are the mount options that become flags of the mount command of the
// same name, and whether they have a value. Dashes may be written as underscores.
func helperKeys() map[string]bool {
	return map[string]bool{
		"cache-size": true, "cache-min-free": true, "paranoid": false,
		"backend": true, "platform": true, "layer": true, "blob": true, "authfile": true, "cache-dir": true,
		"on-error": true, "overlay": true, "nbd-connections": true, "device": true, "memory": true,
		"tls-ca": true, "tls-verify": true, "max-conns-per-host": true, "verify": true, "metrics": true, "record": true, "prefetch": true, "prefetch-rate": true, "prefetch-budget": true,
		"plain-http": false, "tmpfs-overlay": false, "supervise": false, "offline": false,
	}
}

// helperFlags makes flags of mount options. What is not ours is left to -o, which
// knows what fstab(5) and mount(8) have among themselves.
func helperFlags(options []string, sloppy bool) ([]string, error) {
	var flags, rest []string
	for _, word := range options {
		name, value, valued := strings.Cut(word, "=")
		key := strings.ReplaceAll(name, "_", "-")
		wants, ours := helperKeys()[key]
		switch {
		case key == "password" || key == "pass":
			return nil, usagef("mount option %s: a password is not taken here, since everybody may read fstab and ps; podman login or docker login keeps it in a file, which authfile=FILE names", name)
		case key == "username" || key == "password-stdin" || key == "creds-stdin":
			return nil, usagef("mount option %s: nobody can be asked for the password; podman login or docker login keeps it in a file, which authfile=FILE names", name)
		case ours && wants && value == "":
			return nil, usagef("mount option %s needs a value, as %s=VALUE", name, name)
		case ours && !wants && valued:
			return nil, usagef("mount option %s takes no value", name)
		case ours && wants:
			flags = append(flags, "--"+key+"="+value)
		case ours:
			flags = append(flags, "--"+key)
		case word == "rw" || word == "":
			// mount(8) says rw where nobody said anything.
		case sloppy && unknownOption(word):
		default:
			rest = append(rest, word)
		}
	}
	if len(rest) > 0 {
		flags = append(flags, "-o", strings.Join(rest, ","))
	}
	return flags, nil
}

func unknownOption(word string) bool {
	_, err := backend.ParseMountOptions([]string{word})
	return err != nil
}
