package main

import (
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
)

// arguments returns the n arguments of a command. Options come before them: what
// looks like an option after them would be taken for an argument.
func arguments(c *cli.Context, names ...string) ([]string, error) {
	args := c.Args().Slice()
	if err := noOptions(c, args, names[0]); err != nil {
		return nil, err
	}
	if len(args) != len(names) {
		return nil, wrongNumber(c, strings.Join(names, " and "), len(args))
	}
	return args, nil
}

// argumentsAtLeast returns the arguments of a command that takes at least n; names
// are theirs, the last of which may be repeated.
func argumentsAtLeast(c *cli.Context, n int, names ...string) ([]string, error) {
	args := c.Args().Slice()
	if err := noOptions(c, args, names[0]); err != nil {
		return nil, err
	}
	if len(args) < n {
		return nil, wrongNumber(c, strings.Join(names, " "), len(args))
	}
	return args, nil
}

// wrongNumber is the error of a command that takes names, and was given n arguments.
func wrongNumber(c *cli.Context, names string, n int) error {
	_, command, _ := strings.Cut(c.Command.HelpName, " ")
	return usageError(c, fmt.Errorf("%s takes %s, not %d arguments", command, names, n), false)
}

func noOptions(c *cli.Context, args []string, first string) error {
	for _, a := range args {
		if len(a) > 1 && strings.HasPrefix(a, "-") {
			return usageError(c, fmt.Errorf("option %s must come before %s", a, first), false)
		}
	}
	return nil
}

// notEmpty refuses a flag that was given without a value: a variable that is empty by mistake must not mean the default.
func notEmpty(c *cli.Context, flag, want string) error {
	if c.IsSet(flag) && c.String(flag) == "" {
		return usagef("--%s needs %s", flag, want)
	}
	return nil
}

func jsonFlag() cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "print JSON"}
}

// without leaves one of the flags out.
func without(flags []cli.Flag, name string) []cli.Flag {
	return slices.DeleteFunc(flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), name) })
}

// parseSize reads a number of bytes with a binary unit.
func parseSize(flag, s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGTiB")
	n, err := strconv.ParseInt(digits, 10, 64)
	shift, known := map[string]int{"": 0, "B": 0, "K": 10, "KiB": 10, "M": 20, "MiB": 20, "G": 30, "GiB": 30, "T": 40, "TiB": 40}[s[len(digits):]]
	if err != nil || n < 0 || !known || n > math.MaxInt64>>shift {
		return 0, usagef("--%s %q: want a size as 64MiB (K, M, G and T, or KiB, MiB, GiB and TiB)", flag, s)
	}
	return n << shift, nil
}

// absolute is a path for a server in the background, which has another working directory.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}
