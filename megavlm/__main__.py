from megavlm.cli.main import main

main()
