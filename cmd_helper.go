package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// helperDir is where mount(8) looks for its helpers.
const helperDir = "/sbin"

func (p *program) helperCommand() *cli.Command {
	dir := &cli.StringFlag{Name: "dir", Value: helperDir, Usage: "use `DIR`; mount(8) looks in " + helperDir}
	command := func(name, usage string, do func(dir string) (string, error)) *cli.Command {
		return &cli.Command{
			Name: name, Usage: usage, ArgsUsage: " ", Flags: []cli.Flag{dir}, OnUsageError: usageError,
			Action: func(c *cli.Context) error {
				if c.NArg() != 0 {
					return usagef("helper %s takes no arguments", name)
				}
				said, err := do(c.String("dir"))
				if err == nil {
					_, err = fmt.Fprintln(p.stdout, said)
				}
				return err
			},
		}
	}
	return &cli.Command{
		Name:  "helper",
		Usage: "let mount(8) and fstab(5) mount images",
		Description: "With the link " + helperName + " to this program in " + helperDir + ",\n" +
			"   mount -t erofs-oci REF DIR -o backend=auto,platform=linux/arm64\n" +
			"mounts, and so does a line in /etc/fstab:\n" +
			"   REF DIR erofs-oci defaults,_netdev 0 0\n" +
			"The options of mount(8) may be given, and these flags of erofs-oci mount, with or without\n" +
			"underscores:\n" + helperOptions() + "\n" +
			"A password is no option: log in with podman login or docker login.",
		HideHelpCommand: true,
		Subcommands: []*cli.Command{
			command("install", "make the link", installHelper),
			command("remove", "take the link away", removeHelper),
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("unknown command %q; see erofs-oci helper --help", "helper "+c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

// helperOptions are the mount options that become flags, in lines of a help text.
func helperOptions() string {
	const width = 90
	text, line := "", "  "
	for i, key := range slices.Sorted(maps.Keys(helperKeys())) {
		word := " " + strings.ReplaceAll(key, "-", "_")
		if i > 0 {
			line += ","
		}
		if len(line)+len(word) > width {
			text, line = text+line+"\n", "  "
		}
		line += word
	}
	return text + line
}

// installHelper links the helper to this program. A link of ours to another place
// is replaced; anything else is left alone.
func installHelper(dir string) (string, error) {
	program, err := os.Executable()
	if err != nil {
		return "", err
	}
	link := filepath.Join(dir, helperName)
	said := fmt.Sprintf("%s now leads to %s: mount -t erofs-oci REF DIR works, and so do lines of that type in /etc/fstab", link, program)
	ours, err := helperLink(link, program)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return said, os.Symlink(program, link)
	case err != nil:
		return "", err
	case !ours:
		return "", fmt.Errorf("%s is there and leads to another program: take it away first", link)
	}
	// Replaced at once: somebody may be mounting.
	next := link + ".new"
	if err := os.Symlink(program, next); err != nil {
		return "", err
	}
	if err := os.Rename(next, link); err != nil {
		return "", errors.Join(err, os.Remove(next))
	}
	return said, nil
}

// removeHelper takes away what installHelper made.
func removeHelper(dir string) (string, error) {
	program, err := os.Executable()
	if err != nil {
		return "", err
	}
	link := filepath.Join(dir, helperName)
	ours, err := helperLink(link, program)
	if errors.Is(err, fs.ErrNotExist) {
		return link + " is not there: nothing to remove", nil
	}
	if err == nil && !ours {
		err = fmt.Errorf("%s leads to another program: left alone", link)
	}
	if err != nil {
		return "", err
	}
	return link + " is removed", os.Remove(link)
}

// helperLink tells whether link is a symbolic link to a program, or to where a
// program of that name was before.
func helperLink(link, program string) (bool, error) {
	st, err := os.Lstat(link)
	if err != nil {
		return false, err
	}
	if st.Mode().Type() != fs.ModeSymlink {
		return false, nil
	}
	to, err := os.Readlink(link)
	if err != nil {
		return false, err
	}
	return filepath.Base(to) == filepath.Base(program), nil
}
